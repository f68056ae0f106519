"""Answers corrected by an Aligner, and judged, chunk by chunk."""

import logging
from collections.abc import Sequence

from jobs.pool import Chunk, settle_in
from jobs.rows import Row
from jobs.rows_config import CorrectConfig
from pilotfish.context import Prompt
from pilotfish.data.preferences import is_copy
from pilotfish.data.records import Demonstration, PromptText
from pilotfish.decode.sequence import FinishReason
from pilotfish.decode.writer import Writer
from pilotfish.errors import ConfigError, PromptError
from pilotfish.evaluation.rewards import Reward, build_reward
from pilotfish.guides import check_guide
from pilotfish.guides.aligner import AlignerGuide, AlignerSettings
from pilotfish.guides.card import read_card
from pilotfish.guides.host import load_writer
from pilotfish.models.loading import pick_device

logger = logging.getLogger(__name__)


class Corrector:
    """Holds the Aligner and the judge; see `jobs.pool.Worker`."""

    def __init__(self, config: CorrectConfig) -> None:
        self._config = config
        self._loaded: tuple[AlignerGuide, Reward] | None = None

    def process(self, chunk: Chunk[Demonstration]) -> list[Row]:
        """Correct answers. Those that the Aligner cannot read whole get no row, and are logged.

        Raises what loading the models raises, at the first chunk.
        """
        aligner, judge = self._load()
        items = _readable(aligner, chunk.items)
        prompts = [item.prompt for item in items]
        answers = [item.completion for item in items]
        written = aligner.revise_all([_as_prompt(prompt) for prompt in prompts], answers)
        corrections = [one.text for one in written]
        before, after = judge.judge(prompts, answers), judge.judge(prompts, corrections)
        rows: list[Row] = []
        for item, one, old, new in zip(items, written, before, after, strict=True):
            row: Row = {
                "prompt": item.prompt,
                "answer": item.completion,
                "correction": one.text,
                "copied": is_copy(item.completion, one.text),
                "finish_reason": FinishReason.STOP if one.complete else FinishReason.LENGTH,
            }
            if old.reward is not None and new.reward is not None:
                row |= {"answer_reward": old.reward, "correction_reward": new.reward}
            rows.append(row)
        return rows

    def _load(self) -> tuple[AlignerGuide, Reward]:
        if self._loaded is None:
            config, actors = self._config, self._config.actors
            settle_in(actors)
            writer = load_writer(
                config.aligner,
                device=pick_device(actors.device),
                dtype=actors.dtype,
                num_slots=actors.batch_size,
            )
            aligner = AlignerGuide.of(Writer(*writer), aligner_settings(config.aligner))
            self._loaded = aligner, build_reward(config.reward, device=actors.device)
        return self._loaded


def aligner_settings(folder: str) -> AlignerSettings:
    """Return the settings on an Aligner's card. Raises `CheckpointError` or `ConfigError`."""
    card = read_card(folder)
    if card.kind != "aligner":
        raise ConfigError(
            f"aligner is {folder!r}, a guide of kind {card.kind!r}. Give the folder of an Aligner."
        )
    check_guide(folder, base=card.base, base_vocab=card.vocab)
    return AlignerSettings(**card.settings)


def _readable(aligner: AlignerGuide, items: Sequence[Demonstration]) -> list[Demonstration]:
    kept: list[Demonstration] = []
    problems: list[str] = []
    for item in items:
        try:
            aligner.check(_as_prompt(item.prompt), item.completion)
            kept.append(item)
        except PromptError as error:
            problems.append(str(error))
    if problems:
        logger.warning("%d of %d answers left out: %s", len(problems), len(items), problems[0])
    return kept


def _as_prompt(prompt: PromptText) -> Prompt:
    """Return the prompt as an Aligner reads it: as text, which no base has tokenised."""
    if isinstance(prompt, str):
        return Prompt([], text=prompt)
    return Prompt([], messages=prompt)
