"""Decode-time knobs: a point of the space as a setting, and as lines of guide cards."""

import itertools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.decoder import check_setting
from pilotfish.config import parse
from pilotfish.errors import ConfigError, PromptError
from pilotfish.evaluation.settings import Setting
from pilotfish.guides import vary_card
from pilotfish.guides.card import CARD_NAME, GuideCard, read_card, write_card
from tune.config import DecodingSearchConfig
from tune.space import show


def setting_of(setting: Setting, knobs: Mapping[str, Any], *, name: str) -> Setting:
    """Return the setting with its knobs turned. Raises `ConfigError` for values of a wrong type."""
    guides, args = dict(setting.guides), {one: dict(own) for one, own in setting.args.items()}
    fields: dict[str, Any] = {"guides": guides, "args": args, "name": name}
    for key, value in knobs.items():
        guide, field = guide_and_field(key)
        if guide is None:
            fields[key] = value
        elif field is None:
            guides[guide] = value
        else:
            args.setdefault(guide, {})[field] = value
    return parse(Setting, {**setting.model_dump(), **fields}, source="knobs")


def guide_and_field(key: str) -> tuple[str | None, str | None]:
    """Split a key of the space: the guide it is about, if any, and the setting of that guide;
    without one it is the guide's weight."""
    part, _, rest = key.partition(".")
    if part == "guides":
        return rest, None
    if part == "args":
        guide, _, field = rest.rpartition(".")
        return guide, field
    return None, None


def check_space(config: DecodingSearchConfig, cards: Mapping[str, GuideCard]) -> None:
    """Raise `ConfigError` for a point at the corners of the space that guides cannot honour."""
    corners = [values.corners for values in config.space.values()]
    for values in itertools.product(*corners):
        knobs = dict(zip(config.space, values, strict=True))
        try:
            check_setting(setting_of(config.setting, knobs, name="corner"), cards)
        except (ConfigError, PromptError) as error:
            raise ConfigError(f"the space holds {show(knobs)}, which cannot be: {error}") from error


def check_applicable(config: DecodingSearchConfig) -> None:
    """Raise `ConfigError` where no knob could be written into a card in a folder."""
    guides = {guide for guide, _ in map(guide_and_field, config.space) if guide is not None}
    if not guides:
        raise ConfigError(
            f"--apply writes knobs into cards of guides, and {', '.join(config.space)} belong to "
            "the request. Send them with each request, as temperature and the like."
        )
    for guide in sorted(guides):
        source = config.guides[guide]
        if isinstance(source, dict):
            raise ConfigError(
                f"--apply cannot write into guide {guide!r}: it has no folder, and so no "
                "card. Write the knobs where its fields are given."
            )
        if not Path(source).is_dir():
            raise ConfigError(
                f"--apply cannot write into guide {guide!r}, {source!r}: versions of a registry "
                "never change. Search with the folder it was registered from, and register that "
                "again."
            )


def apply_to_cards(config: DecodingSearchConfig, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Write knobs into the cards of their guides, and return those that belong to the request.

    Each card also keeps all of them, under `tuned` in `training`, since they were found together.
    """
    turned: dict[str, dict[str, Any]] = {}
    left = {}
    for key, value in knobs.items():
        guide, field = guide_and_field(key)
        if guide is None:
            left[key] = value
        else:
            turned.setdefault(guide, {})[field or "weight"] = value
    for guide, changes in turned.items():
        tuned = {"knobs": dict(knobs), "from": config.output}
        _rewrite(Path(str(config.guides[guide])), changes, tuned)
    return left


def _rewrite(folder: Path, changes: Mapping[str, Any], tuned: Mapping[str, Any]) -> None:
    """Write a card anew, whole or not at all."""
    card = read_card(folder)
    args = {name: value for name, value in changes.items() if name != "weight"}
    varied = vary_card(card, args)
    fields = {
        "weight": float(changes.get("weight", card.weight)),
        "training": {**card.training, "tuned": dict(tuned)},
    }
    with tempfile.TemporaryDirectory(dir=folder.parent) as incoming:
        write_card(incoming, varied.model_copy(update=fields))
        os.replace(Path(incoming) / CARD_NAME, folder / CARD_NAME)
