"""Guides that select among answers, or rewrite them, as the ingress knows them.

Their models run elsewhere. Here are their settings, and what decides beforehand whether a request
can be answered: how long their models' texts may be.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from pilotfish.chat import render_prompt
from pilotfish.context import Prompt
from pilotfish.decode.detokenize import TextStream
from pilotfish.guides import load_guide, vary_guide
from pilotfish.guides.aligner import AlignerGuide
from pilotfish.guides.base import Guide, Selector, Stage, TextModel
from pilotfish.guides.card import GuideCard, read_card
from pilotfish.guides.host import GuideHost
from pilotfish.models.loading import load_architecture, load_tokenizer
from pilotfish.models.reward import RewardModel
from serve.api.journal import Journal
from serve.catalog import Catalog, GuideVersion
from serve.wire import GuideUse


@dataclass(frozen=True, slots=True)
class WholeAnswerGuide:
    """One version of such a guide. Its settings, and no models."""

    guide: Guide
    card: GuideCard
    tokenizer: PreTrainedTokenizerBase | None
    """Of a guide that rewrites."""

    def selecting(self, use: GuideUse) -> "Selection":
        """Raises `ConfigError` for settings that the guide cannot take, as `revising` does."""
        return Selection(use, cast(Selector, self._varied(use)))

    def revising(self, use: GuideUse) -> "Revision":
        assert self.tokenizer is not None
        return Revision(use, cast(AlignerGuide, self._varied(use)), self.tokenizer)

    def _varied(self, use: GuideUse) -> Guide:
        return vary_guide(self.guide, self.card, use.args) if use.args else self.guide


@dataclass(frozen=True, slots=True)
class Selection:
    """The guide of a request that selects."""

    use: GuideUse
    selector: Selector
    """Says how many drafts there are and how long a block is; it can choose nothing here."""


@dataclass(frozen=True, slots=True)
class Revision:
    """A guide of a request that rewrites."""

    use: GuideUse
    _guide: AlignerGuide
    _tokenizer: PreTrainedTokenizerBase

    def check(self, prompt: Prompt) -> None:
        """Raise `PromptError` if no answer to this prompt could be rewritten."""
        self._guide.check(prompt)

    def journal(self, prompt: Prompt, draft: str, request_id: str) -> Journal:
        """Return what is to be written. Raises `PromptError` for a draft that does not fit."""
        writing = self._guide.writing(prompt, draft)
        return Journal(
            request_id=f"{request_id}-{self.use.version.name}",
            prompt_ids=render_prompt(self._tokenizer, writing.text),
            text=writing.text,
            params={
                "temperature": writing.temperature,
                "max_tokens": writing.max_tokens,
                "seed": writing.seed,
            },
        )

    def text(self) -> TextStream:
        return TextStream(self._tokenizer)


def load(version: GuideVersion) -> WholeAnswerGuide:
    """Read one version's settings. Raises `CheckpointError` for a folder that is no such guide."""
    folder = version.artifact.load(version.version)
    card = read_card(folder)
    tokenizer = load_tokenizer(folder) if version.stage is Stage.REVISION else None
    guide = load_guide(folder, card, cast(GuideHost, _Sizes()))
    return WholeAnswerGuide(guide, card, tokenizer)


def versions(catalog: Catalog) -> list[GuideVersion]:
    """Return the versions of a catalog's guides that act on whole answers."""
    every = [version for entry in catalog.guides for version in entry.versions]
    return [version for version in every if version.stage is not Stage.TOKEN]


class _Sizes:
    """A host whose models are known by their sizes alone."""

    remote = None
    num_slots = 1

    def load_reward(self, folder: str | Path, *_: Any, **__: Any) -> RewardModel:
        return cast(RewardModel, _Sized(folder))

    def load_text_model(self, folder: str | Path) -> TextModel:
        return cast(TextModel, _SizedText(folder))


class _Sized:
    def __init__(self, folder: str | Path) -> None:
        config = load_architecture(folder).get_text_config()
        self.max_length: int = config.max_position_embeddings


class _SizedText(_Sized):
    """A text model that counts."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._tokenizer = load_tokenizer(folder)

    def num_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, verbose=False))
