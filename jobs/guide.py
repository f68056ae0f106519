"""Write the folder of a guide that needs no training, since it is made of models that exist.

    python -m jobs.guide CONFIG [key=value ...] [--dry-run]

Such are Transfer Q*, best-of-N, and the same reward model under other settings. The folder holds a
card, `guide.json`, and no weights; it is evaluated, searched and served like any other.

Exit codes: 0 done, 1 the base cannot be read, 2 the config cannot be honoured.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from jobs.command import run_command
from jobs.paths import absolute, output_paths
from pilotfish.config import Config
from pilotfish.errors import ConfigError
from pilotfish.guides import make_card
from pilotfish.guides.card import CARD_NAME, write_card
from pilotfish.models.loading import load_tokenizer
from pilotfish.models.vocab import fingerprint


class GuideConfig(Config):
    """What the card will say; see `pilotfish.guides.card.GuideCard`."""

    root: str = "runs"
    """Folder of everything jobs write; on a cluster, one that every node sees."""
    output: str
    """The folder to write."""
    base: str
    """Folder or hub id of the base that it is for."""
    kind: str
    """A key of `pilotfish.guides.GUIDES`."""
    weight: float = 1.0
    template: Literal["base", "own"] = "base"
    gate: float | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the kind; the models in them are folders or hub ids."""


def resolved(config: GuideConfig) -> GuideConfig:
    """Return the config with absolute paths. Raises `ConfigError`, for settings too."""
    settings = {name: absolute(value) for name, value in config.settings.items()}
    paths = output_paths(config.root, config.output)
    found = config.model_copy(
        update={**paths, "base": absolute(config.base), "settings": settings}
    )
    _card(found, base_vocab="")
    return found


def write_guide(config: GuideConfig) -> Path:
    """Write the folder and return it; a card that is there is replaced.

    Raises `CheckpointError` for a base without a tokenizer, and `ConfigError` for settings that the
    kind does not know, and for an output with anything but a card in it.
    """
    config = resolved(config)
    output = Path(config.output)
    others = [path for path in output.glob("*") if path.name != CARD_NAME]
    if others:
        raise ConfigError(
            f"output {str(output)!r} holds {others[0].name!r}, so it is no folder of this command. "
            "Choose another output."
        )
    vocab = fingerprint(load_tokenizer(config.base))
    output.mkdir(parents=True, exist_ok=True)
    write_card(output, _card(config, base_vocab=vocab))
    return output


def _card(config: GuideConfig, *, base_vocab: str):
    fields = config.model_dump(include={"kind", "weight", "template", "gate", "settings"})
    return make_card(fields, base=config.base, base_vocab=base_vocab)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module docstring."""
    return run_command(
        argv,
        job="guide",
        about="Write the folder of a guide that is made of models that exist.",
        config_type=GuideConfig,
        resolved=resolved,
        run=lambda config: f"guide: {write_guide(config)}",
    )


if __name__ == "__main__":
    sys.exit(main())
