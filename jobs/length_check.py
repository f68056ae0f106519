"""Whether guided answers become shorter or longer than the base's: a GenARM reward sums log-probs.

Such a sum favours short answers for free (see `pilotfish.losses.genarm_loss`), and pairs whose
better answer is the longer one pull the other way.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jobs.frozen_base import FrozenBase
from pilotfish.context import Prompt
from pilotfish.data.collate import PairExample
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Request, SamplingParams
from pilotfish.guides.genarm import GenARMGuide
from pilotfish.models.causal_lm import CausalLM
from pilotfish.train.metrics import Tally
from pilotfish.train.objectives.genarm import LengthCheck

logger = logging.getLogger(__name__)

_MAX_SHIFT = 0.2
_GUIDE = "guide"


class GuidedLengths:
    """Answers held-out prompts with the base, and with the guide beside it."""

    def __init__(
        self,
        config: LengthCheck,
        base: FrozenBase,
        guide: PreTrainedModel,
        *,
        end_ids: frozenset[int],
        seed: int,
    ) -> None:
        """`guide` is a model of the learner's shape, which will be given its weights."""
        self._config, self._base, self._guide = config, base, guide.requires_grad_(False)
        self._lm = base.causal_lm(num_slots=config.batch_size)
        self._end_ids, self._seed = end_ids, seed

    def tally(
        self, examples: Sequence[PairExample], weights: Mapping[str, Tensor]
    ) -> dict[str, Tally]:
        """Return lengths on this worker's share of the held-out prompts. A collective."""
        self._guide.load_state_dict(weights)
        guide = CausalLM(self._guide, num_slots=self._config.batch_size, pack=False)
        share = range(self._base.data_rank, self._config.num_prompts, self._base.data_size)
        prompts = [
            (place, examples[place].chosen.token_ids[: examples[place].chosen.num_prompt_tokens])
            for place in share
            if place < len(examples)
        ]
        with self._base.lockstep():
            engine = Engine(self._lm, {_GUIDE: GenARMGuide(guide)}, end_ids=self._end_ids)
            plain = self._lengths(engine, prompts, {})
            guided = self._lengths(engine, prompts, {_GUIDE: self._config.weight})
        return {"base_length": plain, "guided_length": guided}

    @torch.no_grad()
    def _lengths(
        self,
        engine: Engine,
        prompts: Sequence[tuple[int, list[int]]],
        guides: Mapping[str, float],
    ) -> Tally:
        for place, token_ids in prompts:
            params = SamplingParams(max_tokens=self._config.max_tokens, seed=self._seed)
            engine.submit(
                Request(key=place, prompt=Prompt(token_ids), params=params, guides=guides)
            )
        num_tokens = 0
        while engine.busy:
            num_tokens += len(engine.step())
        return Tally(float(num_tokens), float(len(prompts)))


def length_report(tallies: Mapping[str, Tally]) -> dict[str, float]:
    """Return the mean lengths over all workers and the shift, which is warned of where large."""
    base, guided = (tallies[name].mean for name in ("base_length", "guided_length"))
    shift = guided / base - 1
    if abs(shift) > _MAX_SHIFT:
        logger.warning(
            "guided answers have %.1f tokens on average and the base's %.1f (%+.0f%%): the guide "
            "steers length, too. If that is not what the preferences are about, compare with "
            "objective.length_normalization=true, or balance the lengths of the pairs.",
            guided,
            base,
            100 * shift,
        )
    return {
        "eval/base_length": base,
        "eval/guided_length": guided,
        "eval/length_shift": shift,
    }
