"""What an application serves: the base, and its guides by name and version. Plain values."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from transformers import GenerationConfig, PreTrainedTokenizerBase

import pilotfish
from pilotfish.chat import stop_ids
from pilotfish.errors import CheckpointError
from pilotfish.guides import GUIDES, check_guide, check_remote
from pilotfish.guides.base import Stage
from pilotfish.models.loading import load_architecture, load_tokenizer
from pilotfish.models.vocab import fingerprint
from serve.artifacts import Artifact, pin
from serve.config import GuideConfig, ServeConfig

Placement: TypeAlias = Literal["colocated", "remote"]


@dataclass(frozen=True, slots=True)
class BaseEntry:
    """The base, loaded from where, as the name requests use."""

    model_id: str
    artifact: Artifact
    version: str
    vocab: str
    """Fingerprint of its vocabulary."""
    vocab_size: int
    max_length: int
    end_ids: frozenset[int] = frozenset()
    """What ends an answer."""


@dataclass(frozen=True, slots=True)
class GuideVersion:
    """One version of a guide: the same weights whoever loads it, and whenever."""

    name: str
    version: str
    artifact: Artifact
    kind: str
    weight: float
    """For requests that name none."""

    @property
    def key(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def stage(self) -> Stage:
        return GUIDES[self.kind].stage


@dataclass(frozen=True, slots=True)
class Trial:
    """A version that is tried on a share of the requests that name the guide."""

    version: GuideVersion
    share: float


@dataclass(frozen=True, slots=True)
class GuideEntry:
    """One guide that requests can name, in all versions that are served."""

    current: GuideVersion
    placement: Placement
    canary: Trial | None = None
    """Answers its share of the requests."""
    shadow: Trial | None = None
    """Decodes its share of the requests once more, for the metrics; nobody sees the answers."""
    enabled: bool = True

    @property
    def name(self) -> str:
        return self.current.name

    @property
    def versions(self) -> list[GuideVersion]:
        """All versions that are served, the current one first."""
        trials = [trial for trial in (self.canary, self.shadow) if trial is not None]
        found = {version.key: version for version in (self.current, *(t.version for t in trials))}
        return list(found.values())


@dataclass(frozen=True, slots=True)
class Catalog:
    """The base and its guides, at one moment: every change is another catalog."""

    base: BaseEntry
    guides: tuple[GuideEntry, ...]
    created: int
    revision: int = 0
    """Counts changes; of two catalogs the one with the higher number holds."""

    def guide(self, name: str) -> GuideEntry | None:
        return next((guide for guide in self.guides if guide.name == name), None)

    def is_newer(self, other: "Catalog") -> bool:
        """Whether this is what became of another one, of the same deployment."""
        return self.created == other.created and self.revision > other.revision

    def with_guide(self, entry: GuideEntry) -> "Catalog":
        """Return the next catalog, in which one guide is another."""
        guides = tuple(entry if guide.name == entry.name else guide for guide in self.guides)
        return replace(self, guides=guides, revision=self.revision + 1)

    def model_ids(self) -> list[str]:
        base = self.base.model_id
        return [base, *(f"{base}:{guide.name}" for guide in self.guides)]

    def system_fingerprint(self, guides: Sequence[GuideVersion]) -> str:
        """Return a hash of everything but the request that decides what is sampled."""
        parts = [pilotfish.__version__, self.base.version, *(guide.key for guide in guides)]
        return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


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
        vocab=fingerprint(tokenizer),
        vocab_size=len(tokenizer),
        max_length=_max_length(folder),
        end_ids=_end_ids(folder, tokenizer),
    )
    guides = tuple(_guide_entry(guide, config, base) for guide in config.guides)
    return Catalog(base, guides, created)


def resolve_version(guide: GuideConfig, base: BaseEntry, *, artifact: Artifact) -> GuideVersion:
    """Look into an artifact: return it as a version of a guide that can steer this base.

    Raises what `make_catalog` raises.
    """
    folder = artifact.fetch()
    card = check_guide(folder, base=base.artifact.uri, base_vocab=base.vocab)
    if guide.placement == "remote" and GUIDES[card.kind].stage is not Stage.REVISION:
        check_remote(card, guide.name)
    return GuideVersion(
        name=guide.name,
        version=artifact.version(folder),
        artifact=artifact,
        kind=card.kind,
        weight=card.weight if guide.weight is None else guide.weight,
    )


def _guide_entry(guide: GuideConfig, config: ServeConfig, base: BaseEntry) -> GuideEntry:
    version = resolve_version(guide, base, artifact=pin(guide.path, config.tracking_uri))
    revises = version.stage is Stage.REVISION
    if revises and guide.placement != "remote":
        raise CheckpointError(
            f"guide {guide.name!r} is of kind {version.kind!r}, which rewrites whole answers with "
            "a model of its own. Give it replicas of its own: placement: remote."
        )
    return GuideEntry(current=version, placement=guide.placement)


def _max_length(folder: str) -> int:
    return load_architecture(folder).get_text_config().max_position_embeddings


def _end_ids(folder: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    try:
        generation = GenerationConfig.from_pretrained(folder)
    except OSError:
        generation = GenerationConfig.from_model_config(load_architecture(folder))
    return stop_ids(tokenizer, generation)
