"""The README's commands and files exist, its Python runs, and its tree is the tree."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from jobs import export
from pilotfish import world
from pilotfish.guides import GUIDES
from tests.folders import save_base, save_guide

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands() -> list[list[str]]:
    """Every shell command of the README, with continued lines joined and comments dropped."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def job_commands() -> list[list[str]]:
    found = []
    for words in commands():
        words = words[words.index("--") + 1 :] if "--" in words else words
        if words[:2] == ["python", "-m"]:
            found.append(words[2:])
    return found


def test_make_targets_exist_and_have_a_help_line() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = [words[1] for words in commands() if words[0] == "make"]
    assert {"quickstart", "test", "check"} <= set(named)
    for target in named:
        assert re.search(rf"^{target}:.*## \w", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("words", job_commands(), ids=" ".join)
def test_job_commands_resolve(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    if words[0] == "jobs.export":  # understood, but there is nothing to export here
        assert export.main(words[1:]) == 1
        return
    module = importlib.import_module(words[0])
    arguments = [word for word in words[1:] if word != "--dry-run"]
    assert module.main([*arguments, "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)


def test_files_named_anywhere_exist() -> None:
    paths = re.findall(r"(?:jobs|serve|infra|tests|platform|benchmarks)/[\w./-]+", README)
    assert len(set(paths)) >= 10
    for path in set(paths):
        assert (ROOT / path.rstrip(".")).exists(), path


def test_the_tree_lists_every_top_level_folder() -> None:
    [tree] = [block for block in blocks("") if block.startswith("platform/pilotfish/")]
    listed = {line.split("/")[0] for line in tree.splitlines() if not line.startswith(" ")}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"platform", "infra"}
    assert listed == folders
    inside = re.findall(r"^  (\w+(?:\.py)?)", tree, flags=re.MULTILINE)
    assert all((ROOT / "platform" / "pilotfish" / name).exists() for name in inside)


def test_the_python_examples_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, as a reader would; the client of a server is tested with the server."""
    monkeypatch.chdir(tmp_path)
    tokenizer = world.build_tokenizer()
    save_base(Path("runs/kitchen/base"), tokenizer=tokenizer)
    save_guide(Path("runs/kitchen/genarm"), tokenizer=tokenizer)
    examples = [block for block in blocks("python") if "openai" not in block]
    assert len(examples) >= 3
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)  # the README is ours
    assert capsys.readouterr().out.strip()
    assert "pilotfish" in sys.modules


def test_the_table_of_methods_lists_every_kind() -> None:
    table = README.split("## The methods")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = [kind for row in rows for kind in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(GUIDES)
