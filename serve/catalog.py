"""What an application serves: models by name, and which guides a request asks for."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AutoConfig

import pilotfish
from pilotfish.errors import CheckpointError
from pilotfish.guides import GUIDES, check_guide, check_remote
from pilotfish.guides.base import Stage
from pilotfish.models.loading import load_tokenizer
from pilotfish.models.vocab import fingerprint
from serve.artifacts import Artifact, pin
from serve.config import GuideConfig, ServeConfig
from serve.errors import APIError


@dataclass(frozen=True, slots=True)
class BaseEntry:
    """The base, loaded from where, as the name requests use."""

    model_id: str
    artifact: Artifact
    version: str
    vocab_size: int
    max_length: int


@dataclass(frozen=True, slots=True)
class GuideEntry:
    """One guide that requests can name."""

    name: str
    artifact: Artifact
    version: str
    kind: str
    weight: float


@dataclass(frozen=True, slots=True)
class Catalog:
    """The base and its guides: plain values, sent to every replica."""

    base: BaseEntry
    guides: tuple[GuideEntry, ...]
    created: int

    def choose(
        self, model: str, asked: Sequence[tuple[str, float | None]] | None
    ) -> list[tuple[GuideEntry, float]]:
        """Return the guides of a request and their weights, in order of tilting.

        `asked` (the body) goes before the suffix of `model`; None is not asked. Raises `APIError`
        404 for a model or guide that is not served, and 400 for a weight it does not take.
        """
        suffix = self._suffix(model)
        if asked is None:
            asked = [(suffix, None)] if suffix else []
        chosen = []
        for name, weight in asked:
            entry = next((guide for guide in self.guides if guide.name == name), None)
            if entry is None:
                known = ", ".join(guide.name for guide in self.guides) or "none"
                message = f"No guide named {name!r} is served; served: {known}."
                raise APIError(404, message, param="guides", code="guide_not_found")
            strength = entry.weight if weight is None else weight
            if strength not in (0, 1) and not GUIDES[entry.kind].takes_weight:
                message = f"Guide {name!r} is on or off: its weight is {strength}, wanted 0 or 1."
                raise APIError(400, message, param="guides", code="invalid_weight")
            chosen.append((entry, strength))
        return chosen

    def model_ids(self) -> list[str]:
        base = self.base.model_id
        return [base, *(f"{base}:{guide.name}" for guide in self.guides)]

    def system_fingerprint(self, guides: Sequence[GuideEntry]) -> str:
        """Return a hash of everything but the request that decides what is sampled."""
        parts = [pilotfish.__version__, self.base.version]
        parts += [f"{guide.name}@{guide.version}" for guide in guides]
        return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    def _suffix(self, model: str) -> str:
        if model not in self.model_ids():
            known = ", ".join(self.model_ids())
            message = f"The model {model!r} does not exist; served: {known}."
            raise APIError(404, message, param="model", code="model_not_found")
        return model.removeprefix(self.base.model_id).removeprefix(":")


def make_catalog(config: ServeConfig, *, created: int) -> Catalog:
    """Look at every folder before anything starts.

    Raises `CheckpointError` for one that cannot be served, and `VocabMismatchError` for a guide
    trained for another vocabulary.
    """
    artifact = pin(config.base.path, config.tracking_uri)
    folder = artifact.fetch()
    tokenizer = load_tokenizer(folder)
    base = BaseEntry(
        model_id=config.base.model_id,
        artifact=artifact,
        version=artifact.version(folder),
        vocab_size=len(tokenizer),
        max_length=_max_length(folder),
    )
    vocab = fingerprint(tokenizer)
    guides = tuple(_guide_entry(guide, config, vocab=vocab) for guide in config.guides)
    return Catalog(base, guides, created)


def _guide_entry(guide: GuideConfig, config: ServeConfig, *, vocab: str) -> GuideEntry:
    artifact = pin(guide.path, config.tracking_uri)
    folder = artifact.fetch()
    card = check_guide(folder, base=config.base.path, base_vocab=vocab)
    if guide.placement == "remote":
        check_remote(card, guide.name)
    if GUIDES[card.kind].stage is not Stage.TOKEN:
        raise CheckpointError(
            f"guide {guide.name!r} is of kind {card.kind!r}, which acts on whole answers; only "
            "guides that tilt tokens are served. Leave it out of the config; pilotfish.Pilot runs "
            "it."
        )
    return GuideEntry(
        name=guide.name,
        artifact=artifact,
        version=artifact.version(folder),
        kind=card.kind,
        weight=card.weight if guide.weight is None else guide.weight,
    )


def _max_length(folder: str) -> int:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder!r} holds no model config: {error}") from error
    return config.get_text_config().max_position_embeddings
