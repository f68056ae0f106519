"""Transfer Q* beside its textbook form: one rollout at a time, nothing cached.

    python -m benchmarks.rollouts --base runs/kitchen/base --rollout runs/kitchen/base

Both draw the same answers by the same rule with the same models: k candidates a token, each valued
by one greedy rollout of up to `--rollout-tokens`, read by a random reward model. The textbook form
runs each rollout by itself and feeds the whole text for every token of it. Answers are compared
token by token; a difference ends the benchmark.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from benchmarks.machine import describe
from pilotfish import world
from pilotfish.chat import render_prompt, stop_ids
from pilotfish.context import Prompt
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import Request, SamplingParams
from pilotfish.guides.transfer_q import TransferQGuide
from pilotfish.guides.transfer_q_settings import TransferQSettings
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import load_frozen, load_tokenizer
from pilotfish.models.reward import RewardModel


class Textbook:
    """The rule, word by word."""

    def __init__(self, base, rollout, reward, ends: frozenset[int], options: argparse.Namespace):
        self._base, self._rollout, self._reward = base, rollout, reward
        self._ends, self._options = ends, options

    @torch.inference_mode()
    def answer(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Greedy decoding of `log p + w * r(text with the rollout)` over the top k."""
        ids = list(prompt)
        while len(ids) < len(prompt) + max_tokens and not (
            len(ids) > len(prompt) and ids[-1] in self._ends
        ):
            top = self._law(self._base, ids).topk(self._options.candidates)
            scores = [
                logprob + self._options.weight * self._value([*ids, token])
                for logprob, token in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            ids.append(int(top.indices[scores.index(max(scores))]))
        return ids[len(prompt) :]

    def _value(self, ids: list[int]) -> float:
        end = len(ids) + self._options.rollout_tokens
        while len(ids) < end and ids[-1] not in self._ends:
            ids = [*ids, int(self._law(self._rollout, ids).argmax())]
        return self._reward(input_ids=torch.tensor([ids]), use_cache=False).logits.item()

    def _law(self, model, ids: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        return logits[0, -1].log_softmax(-1)


def ours(engine: Engine, prompts: Sequence[list[int]], options: argparse.Namespace):
    """Answer all prompts in one batch; return answers and seconds."""
    params = SamplingParams(max_tokens=options.tokens, temperature=0.0)
    start = time.perf_counter()
    for key, prompt in enumerate(prompts):
        guides = {"tq": options.weight}
        engine.submit(Request(key=key, prompt=Prompt(prompt), params=params, guides=guides))
    answers: dict[int, list[int]] = {key: [] for key in range(len(prompts))}
    while engine.busy:
        for event in engine.step():
            answers[event.key].append(event.token_id)
    return list(answers.values()), time.perf_counter() - start


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="folder of the base")
    parser.add_argument("--rollout", required=True, help="folder of the rollout model")
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--rollout-tokens", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=12, help="tokens per answer")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.base)
    base, rollout = load_frozen(options.base), load_frozen(options.rollout)
    ends = stop_ids(tokenizer, base.generation_config)
    torch.manual_seed(0)
    reward = LlamaForSequenceClassification(
        LlamaConfig(**{**base.config.to_dict(), "num_labels": 1, "pad_token_id": None})
    ).eval()
    prompts = [
        render_prompt(tokenizer, scene.messages) for scene in world.scenes(options.prompts, seed=9)
    ]
    textbook = Textbook(base, rollout, reward, ends, options)
    start = time.perf_counter()
    expected = [textbook.answer(prompt, options.tokens) for prompt in prompts]
    naive = time.perf_counter() - start
    slots = options.prompts * (options.candidates + 1)
    settings = TransferQSettings(
        rollout=options.rollout,
        reward="",
        num_candidates=options.candidates,
        rollout_tokens=options.rollout_tokens,
    )
    guide = TransferQGuide(
        CausalLM(load_frozen(options.rollout), num_slots=slots),
        RewardModel(reward, num_slots=slots),
        settings=settings,
        end_ids=ends,
    )
    engine = Engine(CausalLM(base, num_slots=options.prompts), {"tq": guide}, end_ids=ends)
    ours(engine, prompts, options)  # warms up
    answers, seconds = ours(engine, prompts, options)
    if answers != expected:
        raise SystemExit(f"the answers differ: {answers} against {expected}")
    report = {
        **describe(options.threads),
        "num_tokens": sum(map(len, answers)),
        "textbook_seconds": naive,
        "our_seconds": seconds,
        "speed_up": naive / seconds,
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
