"""From answers to a report: metrics per setting, comparisons, and warnings."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pilotfish.data.records import PromptText
from pilotfish.decode.sequence import Completion, FinishReason
from pilotfish.evaluation.metrics import Comparison, compare, distinct, estimate, share, tidy
from pilotfish.evaluation.report import Answer, Metrics, Report, SettingResult
from pilotfish.evaluation.rewards import Judgement
from pilotfish.evaluation.settings import Setting, controls_of

logger = logging.getLogger(__name__)

_MAX_BAD_SHARE = 0.5
_MAX_LENGTH_SHIFT = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """The answers of one setting, in the order of the prompts, and what they cost."""

    setting: Setting
    answers: Sequence[Answer]
    seconds: float
    num_forwards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a reader has to know beside the numbers."""

    title: str
    base: str
    guides: Mapping[str, str]
    prompts_from: str
    reward: str
    config: Mapping[str, Any]
    run_id: str | None = None


def to_answer(completion: Completion, judged: Judgement) -> Answer:
    """Join an answer and its judgement; where the judge does not say, empty or cut off is bad."""
    broken = not completion.text.strip() or completion.finish_reason == FinishReason.LENGTH
    return Answer(
        text=completion.text,
        num_tokens=len(completion.token_ids),
        finish_reason=str(completion.finish_reason),
        kl=tidy(sum(completion.kl)),
        reward=None if judged.reward is None else tidy(judged.reward),
        parts={name: tidy(value) for name, value in judged.parts.items()},
        reasons=judged.reasons,
        bad=broken if judged.bad is None else judged.bad,
    )


def summarise(
    decoded: Sequence[Decoded], prompts: Sequence[PromptText], *, about: About, seed: int = 0
) -> Report:
    """Return the report; the first setting is the reference. `seed` is for the bootstrap."""
    reference = decoded[0].setting.name
    results = [_result(one, decoded, seed=seed) for one in decoded]
    warnings = _warnings(results)
    for text in warnings:
        logger.warning("%s", text)
    return Report(
        title=about.title,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base=about.base,
        guides=dict(about.guides),
        prompts_from=about.prompts_from,
        reward=about.reward,
        reference=reference,
        prompts=tuple(_plain(prompt) for prompt in prompts),
        results=tuple(results),
        warnings=tuple(warnings),
        run_id=about.run_id,
        config=dict(about.config),
    )


def _result(one: Decoded, decoded: Sequence[Decoded], *, seed: int) -> SettingResult:
    answers = one.answers
    texts = [answer.text for answer in answers]
    count_of = Counter(texts)
    lengths = [answer.num_tokens for answer in answers]
    kl = [answer.kl for answer in answers]
    rewards = _rewards(one)
    metrics = Metrics(
        num_answers=len(answers),
        reward=None if rewards is None else estimate(rewards),
        parts={
            name: estimate([answer.parts[name] for answer in answers]) for name in answers[0].parts
        },
        versus=_comparisons(one, decoded, seed=seed),
        length=estimate(lengths),
        kl=estimate(kl),
        kl_per_token=tidy(sum(kl) / sum(lengths)),
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
        distinct_3=distinct(texts, 3),
        unique=share([count_of[text] == 1 for text in texts]),
        bad_share=share([answer.bad for answer in answers]),
        tokens_per_second=tidy(sum(lengths) / one.seconds),
        forwards_per_token=tidy(one.num_forwards / sum(lengths)),
    )
    return SettingResult(setting=one.setting, metrics=metrics, answers=tuple(answers))


def _comparisons(one: Decoded, decoded: Sequence[Decoded], *, seed: int) -> dict[str, Comparison]:
    """Compare with the reference, and a guided setting with each of its controls."""
    rewards = _rewards(one)
    if rewards is None:
        return {}
    names = {decoded[0].setting.name}
    if not one.setting.is_base:
        names.update(controls_of(one.setting, [other.setting for other in decoded]))
    names.discard(one.setting.name)
    found: dict[str, Comparison] = {}
    for other in decoded:
        if other.setting.name in names:
            theirs = _rewards(other)
            assert theirs is not None, "one judge judges all settings"
            found[other.setting.name] = compare(rewards, theirs, seed=seed)
    return found


def _rewards(one: Decoded) -> list[float] | None:
    rewards = [answer.reward for answer in one.answers if answer.reward is not None]
    return rewards if len(rewards) == len(one.answers) else None


def _warnings(results: Sequence[SettingResult]) -> list[str]:
    """Say what makes the numbers misleading; the first result is the reference."""
    found = [
        f"{result.setting.name}: {result.metrics.bad_share:.0%} of the answers are bad (garbled, "
        "empty or cut off), so its other numbers mean little. Lower the weight or the "
        "temperature, or raise max_tokens."
        for result in results
        if result.metrics.bad_share > _MAX_BAD_SHARE
    ]
    reference = results[0]
    before = reference.metrics.length.mean
    shifts = {
        result.setting.name: result.metrics.length.mean / before - 1
        for result in results
        if not result.setting.is_base
    }
    shifted = [f"{name} {by:+.0%}" for name, by in shifts.items() if abs(by) > _MAX_LENGTH_SHIFT]
    if shifted:
        found.append(
            f"the length of answers has shifted from the {before:.1f} tokens of "
            f"{reference.setting.name}: {', '.join(shifted)}. If the judge likes length for its "
            "own sake, part of any gain is that."
        )
    return found


def _plain(prompt: PromptText) -> str | tuple[dict[str, str], ...]:
    if isinstance(prompt, str):
        return prompt
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in prompt)
