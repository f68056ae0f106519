"""The architecture's rules, as tests: what may import what, how large a piece may grow."""

import ast
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "platform" / "pilotfish"
PACKAGES = ("platform", "jobs", "serve", "tune", "tests", "benchmarks")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60

# Layers of the core, lowest first; a module imports its own part or a lower layer.
LAYERS = (
    ("errors",),
    ("config", "chat", "losses", "noise"),
    ("context",),
    ("correction",),
    ("models", "data", "world"),
    ("guides",),
    ("decode", "chain"),
    ("train",),
    ("evaluation", "answering", "hf", "vllm_plugin"),
    ("pilot",),
    ("__init__",),
)
# Heavy libraries that the core must do without when it is imported.
FORBIDDEN = ("ray", "deepspeed", "mlflow", "datasets", "matplotlib", "openai", "fastapi")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names a file imports, at any depth of its code."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            yield ".".join((*base, *(node.module or "").split("."))).strip(".")
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(part: str) -> int:
    return next(at for at, parts in enumerate(LAYERS) if part in parts)


def test_platform_is_a_source_root_and_the_stdlib_keeps_its_name() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not list((ROOT / "platform").glob("*.py"))
    assert platform.system()


def test_every_part_of_the_core_has_a_layer() -> None:
    parts = {path.stem if path.is_file() else path.name for path in CORE.iterdir()}
    parts -= {"py", "__pycache__"}
    assert parts == {part for layer in LAYERS for part in layer}


@pytest.mark.parametrize("path", python_files("platform"), ids=lambda p: str(p.relative_to(ROOT)))
def test_core_imports_point_downwards(path: Path) -> None:
    part = path.relative_to(CORE).parts[0].removesuffix(".py")
    for name in imported_modules(path):
        steps = name.split(".")
        if steps[0] in ("jobs", "serve", "tune", "tests", "benchmarks"):
            pytest.fail(f"{path.name} imports {name}: the core knows nothing above it")
        if steps[0] != "pilotfish" or len(steps) < 2 or steps[1] == part:
            continue
        known = [step for layer in LAYERS for step in layer]
        if steps[1] in known:
            assert layer_of(steps[1]) < layer_of(part), f"{path.name} imports {name}"


@pytest.mark.parametrize(
    ("package", "never"), [("jobs", ("serve", "tune")), ("serve", ("jobs", "tune")), ("tune", ())]
)
def test_jobs_and_serve_do_not_know_each_other(package: str, never: tuple[str, ...]) -> None:
    for path in python_files(package):
        first = {name.split(".")[0] for name in imported_modules(path)}
        assert not first & set(never), path


def test_the_core_imports_without_ray_deepspeed_or_mlflow() -> None:
    """In a fresh interpreter where importing any of them fails."""
    modules = sorted(
        ".".join(path.relative_to(ROOT / "platform").with_suffix("").parts).removesuffix(
            ".__init__"
        )
        for path in python_files("platform")
    )
    script = (
        "import importlib, sys\n"
        f"for name in {FORBIDDEN!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "platform"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", python_files(*PACKAGES), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_the_wheel_holds_the_core_alone_and_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [
        "platform/pilotfish"
    ]
    extras = project["project"]["optional-dependencies"].values()
    wanted = [*project["project"]["dependencies"], *(name for extra in extras for name in extra)]
    names = {re.split(r"[\[<>=]", name)[0].lower().replace("_", "-") for name in wanted}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "names and versions alone"
    assert names <= {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
