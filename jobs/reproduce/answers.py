"""Answer the questions by one method in this process, and judge the answers."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from jobs.pool import ActorsConfig, settle_in
from jobs.reproduce.measured import Measured
from jobs.reproduce.methods import JUDGE, MAX_TOKENS, SEED, Guided, Method, folder_of
from pilotfish import Pilot, SamplingParams
from pilotfish.context import Prompt
from pilotfish.decode.sequence import Completion
from pilotfish.evaluation.metrics import tidy
from pilotfish.evaluation.rewards import Judgement, KitchenReward, ModelReward, ModelRewardConfig
from pilotfish.guides.base import Stage, Written
from pilotfish.guides.card import read_card
from pilotfish.models.reward import RewardReading
from pilotfish.pilot import Source

BATCH_SIZE = 125


class Copyist:
    """An Aligner that finds nothing to correct: every answer passes byte by byte."""

    stage: ClassVar[Stage] = Stage.REVISION
    takes_weight: ClassVar[bool] = False

    def check(self, prompt: Prompt) -> None:
        """Any prompt will do."""

    def revise(self, prompt: Prompt, draft: str) -> Iterator[str]:
        yield draft

    def revise_all(self, prompts: Sequence[Prompt], drafts: Sequence[str]) -> list[Written]:
        return [Written(draft) for draft in drafts]


def measure(root: Path, method: Method, num: int) -> Measured:
    """Load the models and answer, in this process. Raises what loading and decoding raise."""
    settle_in(ActorsConfig())
    pilot = Pilot(
        folder_of(root, method.base),
        {name: source_of(root, guide) for name, guide in method.guides.items()},
        device="cpu",
        num_slots=BATCH_SIZE,
    )
    weights = {
        pilot.vary(name, **guide.settings) if guide.stage and guide.settings else name: guide.weight
        for name, guide in method.guides.items()
    }
    prompts = method.prompts(num)
    params = [
        SamplingParams(temperature=method.temperature, max_tokens=MAX_TOKENS, seed=SEED + number)
        for number in range(len(prompts))
    ]
    before, started = pilot.num_forwards, time.perf_counter()
    completions = pilot.generate(prompts, params, guides=weights)
    seconds = time.perf_counter() - started
    texts = [one.text for one in completions]
    judge = ModelRewardConfig(path=str(folder_of(root, JUDGE)), batch_size=64)
    return Measured(
        seconds=seconds,
        num_forwards=pilot.num_forwards - before,
        notes=_mean_notes(completions),
        **_columns(completions, KitchenReward().judge(prompts, texts)),
        scores=[
            one.reward or 0.0 for one in ModelReward(judge, device="cpu").judge(prompts, texts)
        ],
    )


def source_of(root: Path, guide: Guided) -> Source:
    """Return what a pilot loads the guide from."""
    if guide.stage is not None:
        return folder_of(root, guide.stage)
    if guide.kind == "copyist":
        return Copyist()
    folders = {name: folder_of(root, stage) for name, stage in guide.models.items()}
    reading: dict[str, Any] = {}
    if reader := folders.get("reward", folders.get("value")):
        known = read_card(reader).settings
        reading = {name: known[name] for name in RewardReading.model_fields if name in known}
    gate = {name: value for name, value in guide.settings.items() if name == "gate"}
    own = {name: value for name, value in guide.settings.items() if name != "gate"}
    paths = {name: str(folder) for name, folder in folders.items()}
    return {"kind": guide.kind, **gate, "settings": {**reading, **paths, **own}}


def _columns(completions: Sequence[Completion], truth: Sequence[Judgement]) -> dict[str, list[Any]]:
    return {
        "texts": [one.text for one in completions],
        "tokens": [len(one.token_ids) for one in completions],
        "kl": [tidy(sum(one.kl)) for one in completions],
        "rewards": [tidy(one.reward or 0.0) for one in truth],
        "helpful": [tidy(one.parts["helpful"]) for one in truth],
        "harmless": [tidy(one.parts["harmless"]) for one in truth],
        "bad": [bool(one.bad) for one in truth],
    }


def _mean_notes(completions: Sequence[Completion]) -> dict[str, float]:
    """Return the mean over tokens of what guides reported, without the guide's name."""
    sums: dict[str, float] = {}
    num = 0
    for one in completions:
        num += len(one.token_ids)
        for notes in one.notes:
            for name, value in notes.items():
                short = name.rpartition(".")[2]
                sums[short] = sums.get(short, 0.0) + value
    return {name: total / num for name, total in sums.items()}
