"""The guide card: `guide.json` beside a guide's weights.

It says what kind of guide the folder holds, which base and vocabulary it was trained for, and how
it was trained, so that loading it against the wrong base is an error and never a silent mistake.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field, ValidationError

from pilotfish.config import Config
from pilotfish.errors import CheckpointError, ConfigError

CARD_NAME = "guide.json"

WeightUnits: TypeAlias = Literal["logprob", "reward"]
"""What a weight multiplies: the guide's log-prob, or the reward that it was trained to be."""


class GuideCard(Config):
    """What a guide folder says about itself."""

    format: Literal[1] = 1
    kind: str
    """A key of `pilotfish.guides.GUIDES`."""
    base: str
    """Folder, URI or hub id of the base the guide was trained beside."""
    vocab: str
    """Vocabulary fingerprint of that base."""
    beta_r: float | None = None
    """GenARM's reward scale in training; the reward is `beta_r` times the guide's log-prob."""
    weight: float = 1.0
    """Weight on the guide's log-prob, used when a request names the guide without one."""
    template: Literal["base", "own"] = "base"
    """How a token guide is prompted: by the base's token ids, or by the chat template in its own
    folder. Continuation tokens are shared either way."""
    gate: float | None = None
    """Act only where the entropy of the base's law exceeds so many nats."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the kind: see `Settings` of its class. Paths are relative to the folder."""
    dtype: str = "float32"
    training: dict[str, Any] = Field(default_factory=dict)
    """Where the weights came from: run id, code version, steps, data."""


def write_card(folder: str | Path, card: GuideCard) -> None:
    """Write `guide.json` into the folder."""
    text = json.dumps(card.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (Path(folder) / CARD_NAME).write_text(text + "\n", encoding="utf-8")


def read_card(folder: str | Path) -> GuideCard:
    """Read a guide folder's card. Raises `CheckpointError` if it is missing or not a card."""
    path = Path(folder) / CARD_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no {CARD_NAME}, so it is not a guide folder. "
            "Train a guide with python -m jobs.train, and give the folder it writes."
        )
    try:
        return GuideCard.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        raise CheckpointError(f"{path} is not a guide card of format 1: {error}") from error


def resolve_weight(card: GuideCard, weight: float, units: WeightUnits) -> float:
    """Return the weight on the guide's log-prob that a weight in `units` means.

    A guide trained with `beta_r` has the reward r = beta_r * log p_guide, so exp(weight * r) is
    p_guide to the power of weight * beta_r: weights in units of reward compare guides that were
    trained with different `beta_r`. Raises `ConfigError` for such a weight where the card has none.
    """
    if units == "logprob":
        return weight
    if units != "reward":
        raise ConfigError(f"weight_units is {units!r}, wanted 'logprob' or 'reward'.")
    if card.beta_r is None:
        raise ConfigError(
            f"weight_units is 'reward', but the card of this {card.kind} guide has no beta_r, so "
            "the scale of its reward is unknown. Give its weight in units of its log-prob."
        )
    return weight * card.beta_r


def resolve_weights(
    cards: Mapping[str, GuideCard], weights: Mapping[str, float] | None, units: WeightUnits
) -> dict[str, float]:
    """Return weights on log-probs by guide name: those given in `units`, or by default the cards'.

    Names without a card pass, for whoever knows all names to refuse. Raises `ConfigError` as
    `resolve_weight` does, and for units of weights that are not given.
    """
    if weights is None:
        if units != "logprob":
            raise ConfigError(f"weight_units is {units!r}, but no weights are given. Give guides.")
        return {name: card.weight for name, card in cards.items()}
    return {
        name: resolve_weight(cards[name], weight, units) if name in cards else weight
        for name, weight in weights.items()
    }
