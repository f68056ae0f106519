"""Aligner: a small LM reads a question and a draft, and writes the answer that replaces it.

Ji et al., "Aligner: Efficient Alignment by Learning to Correct", NeurIPS 2024.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field, NonNegativeFloat, PositiveInt

from pilotfish.config import Config
from pilotfish.context import Prompt
from pilotfish.correction import TEMPLATES, CorrectionTemplate, TemplateChoice, question_of
from pilotfish.errors import PromptError
from pilotfish.guides.base import Stage, TextModel, Writing, Written
from pilotfish.guides.card import GuideCard
from pilotfish.guides.host import GuideHost


class AlignerSettings(TemplateChoice):
    """What an Aligner's card says beside its kind."""

    max_tokens: PositiveInt = 2048
    """The longest answer, in the Aligner's tokens, where its model has room for that many."""
    temperature: NonNegativeFloat = 0.0
    """0 is greedy, which copies best what needs no correction."""
    seed: int = Field(default=0, ge=0, lt=2**64)


class AlignerGuide:
    """Equation (2) of the paper: `pi'(y_c | x) = mu(y_c | y_o, x) * pi(y_o | x)`, by sampling.

    The draft y_o is text when it comes here, whatever model wrote it: it is tokenised anew for the
    Aligner. The same question and draft always give the same revision; the request's seed has no
    part in it. A draft so long that its copy would not fit behind it is a `PromptError`: nothing is
    ever cut from what the Aligner reads.
    """

    stage: ClassVar[Stage] = Stage.REVISION
    takes_weight: ClassVar[bool] = False
    Settings: ClassVar[type[Config]] = AlignerSettings
    varies: ClassVar[tuple[str, ...]] = ("max_tokens", "temperature", "seed")

    def __init__(
        self,
        model: TextModel,
        template: CorrectionTemplate = TEMPLATES["paper"],
        *,
        max_tokens: int = 2048,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        """See `AlignerSettings`."""
        self._model = model
        self._template = template
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._seed = seed

    @classmethod
    def load(
        cls, folder: str | Path, card: GuideCard, settings: AlignerSettings, host: GuideHost
    ) -> "AlignerGuide":
        return cls.of(host.load_text_model(folder), settings)

    @classmethod
    def of(cls, model: TextModel, settings: AlignerSettings) -> "AlignerGuide":
        """Return the guide that a card's settings make of a model."""
        return cls(
            model,
            settings.correction,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
        )

    def vary(self, settings: AlignerSettings) -> "AlignerGuide":
        return self.of(self._model, settings)

    def check(self, prompt: Prompt, draft: str = "") -> None:
        """Raise `PromptError` for a prompt without text, or with more than fits."""
        self.writing(prompt, draft)

    def revise(self, prompt: Prompt, draft: str) -> Iterator[str]:
        return self._model.stream(self.writing(prompt, draft))

    def revise_all(self, prompts: Sequence[Prompt], drafts: Sequence[str]) -> list[Written]:
        pairs = zip(prompts, drafts, strict=True)
        return self._model.write([self.writing(prompt, draft) for prompt, draft in pairs])

    def writing(self, prompt: Prompt, draft: str) -> Writing:
        """Return what the model is asked to write. Raises `PromptError` as `check` does."""
        text = self._template.render(_question(prompt), draft)
        room = self._model.max_length - self._model.num_tokens(text)
        num_draft = self._model.num_tokens(draft)
        if room <= num_draft:  # an end token follows the copy
            raise PromptError(
                f"the Aligner's model has {self._model.max_length} positions, of which the "
                f"question and a draft of {num_draft} tokens leave {max(room, 0)}: not enough to "
                "write such a draft again. Lower max_tokens, shorten the prompt, or leave the "
                "Aligner out."
            )
        return Writing(
            text=text,
            max_tokens=min(self._max_tokens, room),
            temperature=self._temperature,
            seed=self._seed,
        )


def _question(prompt: Prompt) -> str:
    source = prompt.messages if prompt.text is None else prompt.text
    if source is None:
        raise PromptError(
            "the prompt is token ids alone, but an Aligner reads the question as text. Give the "
            "prompt as text or messages, or leave the Aligner out."
        )
    return question_of(source)
