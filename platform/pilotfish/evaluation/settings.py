"""What is compared: ways to decode, and the controls without which a gain means little.

A guide that only sharpens the base would raise many rewards too: an untrained GenARM guide at
weight w is exactly the base at temperature 1/(1 + w). So every comparison holds the base as it is
sampled, the base decoded greedily, and the base at the temperatures that guidance could amount to.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, field_validator, model_validator

from pilotfish.config import Config
from pilotfish.errors import ConfigError


def tracker_name(name: str) -> str:
    """Return a name less the characters that metric trackers refuse."""
    return re.sub(r"[^\w.\- ]+", "", name).strip(" .")


class Sampling(Config):
    """How tokens are drawn."""

    temperature: NonNegativeFloat = 1.0
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: NonNegativeInt = 0


class Setting(Sampling):
    """One way to decode: guides with their weights, and how tokens are drawn."""

    name: str
    guides: dict[str, float] = Field(default_factory=dict)
    """Weight by guide name, in the order of tilting; empty is the base alone."""
    args: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Decode-time settings by guide name, in place of those of its card; see `Pilot.vary`."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.search(r"\w", name):
            raise ValueError("wanted a name with letters or digits")
        return name

    @model_validator(mode="after")
    def _check_args(self) -> Self:
        without = [name for name in self.args if name not in self.guides]
        if without:
            raise ValueError(
                f"args are for guide {without[0]!r}, which is not among the guides "
                f"({', '.join(self.guides) or 'none'})"
            )
        return self

    @property
    def is_base(self) -> bool:
        return not any(self.guides.values())

    @property
    def total_weight(self) -> float:
        return sum(self.guides.values())


class _Draw(NamedTuple):
    """How tokens are drawn; two settings of the base with the same draw are the same."""

    temperature: float
    top_p: float
    top_k: int


_GREEDY = _Draw(0.0, 1.0, 0)


def with_controls(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """Return the base's settings, controls included, and then the guided ones.

    The first is the reference: the sampled base. Raises `ConfigError` for names that clash.
    """
    base = {_draw(setting): setting for setting in reversed(settings) if setting.is_base}
    guided = [setting for setting in settings if not setting.is_base]
    wanted = [draw for setting in guided for draw in _control_draws(setting)]
    wanted += [*base, _GREEDY]
    # The reference samples as most papers do, at temperature 1, if anything here does.
    sampled = [draw for draw in wanted if draw.temperature > 0]
    reference = next((draw for draw in sampled if draw.temperature == 1), None)
    if reference is None:
        reference = _draw(guided[0]) if guided and guided[0].temperature > 0 else _Draw(1.0, 1.0, 0)
    others = sorted(set(wanted) - {reference}, reverse=True)
    controls = [base.get(draw) or _base_setting(draw) for draw in (reference, *others)]
    every = (*controls, *guided)
    names = [tracker_name(setting.name) for setting in every]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(
            f"two settings are named {twice[0]!r} (less what metric trackers refuse). Controls are "
            "named `base ...`; give every setting a name of its own."
        )
    return every


def controls_of(setting: Setting, settings: Sequence[Setting]) -> list[str]:
    """Return the names of the controls, among `settings`, that a guided setting has to beat."""
    wanted = set(_control_draws(setting))
    return [other.name for other in settings if other.is_base and _draw(other) in wanted]


def _control_draws(setting: Setting) -> list[_Draw]:
    """The sampled base, the greedy base, and what sharpening by the weights alone would give."""
    temperatures = [setting.temperature or 1.0]
    if setting.total_weight > 0:
        sharpened = 1 / (1 + setting.total_weight)
        temperatures += [setting.temperature * sharpened, sharpened]
    draws = [
        _Draw(round(temperature, 6), setting.top_p, setting.top_k)
        for temperature in temperatures
        if temperature > 0
    ]
    return [*dict.fromkeys(draws), _GREEDY]


def _draw(setting: Setting) -> _Draw:
    if setting.temperature == 0:
        return _GREEDY
    return _Draw(round(setting.temperature, 6), setting.top_p, setting.top_k)


def _base_setting(draw: _Draw) -> Setting:
    parts = ["base"]
    if draw.temperature == 0:
        parts.append("greedy")
    elif draw.temperature != 1:
        parts.append(f"T={draw.temperature:.3g}")
    if draw.top_p < 1:
        parts.append(f"top-p={draw.top_p:.3g}")
    if draw.top_k:
        parts.append(f"top-k={draw.top_k}")
    return Setting(
        name=" ".join(parts), temperature=draw.temperature, top_p=draw.top_p, top_k=draw.top_k
    )
