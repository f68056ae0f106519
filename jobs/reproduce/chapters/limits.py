"""What all methods share: what they cost, where they break, and how little of them is needed."""

import itertools

import numpy as np

from jobs.reproduce import figures
from jobs.reproduce.chapter import Chapter, ChapterSpec, Criterion, Evidence, Plot, Table, at_least
from jobs.reproduce.chapters.genarm import best_args
from jobs.reproduce.measured import Results
from jobs.reproduce.study import (
    ARGS_WEIGHTS,
    EQUAL_WEIGHT,
    GATES,
    GENARM_WEIGHTS,
    NUM_DRAFTS,
    args_name,
)
from pilotfish.evaluation.metrics import interval, resamples

_ARGS = args_name(ARGS_WEIGHTS[2])
_TRANSFER = f"transfer_w{EQUAL_WEIGHT:g}"
_NUM_CANDIDATES = 10
_SLOWER = 5.0
_KEPT, _OPEN = 0.9, 0.25


def write(evidence: Evidence) -> Chapter:
    """Write the chapter from what was measured."""
    results = evidence.results
    ratio = results[_TRANSFER].seconds_per_answer / results["genarm"].seconds_per_answer
    return Chapter(
        title="Costs and limits",
        paper="Across papers: over-optimisation, cost, length, and acting only where it matters",
        claim=(
            "Pushing a learned reward too far lowers the true one; rolling out every candidate "
            "costs an order of magnitude more than asking one guide; and a guide need not act at "
            "every token."
        ),
        published=(
            "Transfer Q* 130.53 s and GenARM 7.28 s per 128 tokens, 17.9 times (7B; a survey's "
            "table); a sparse gate at about a quarter of the tokens keeps the gain (SIA)"
        ),
        ours=f"Transfer Q* takes {ratio:.0f} times as long as GenARM per answer",
        criteria=[
            *_costs(results, ratio),
            *_over_optimisation(results),
            _gate(results),
            _length(results),
        ],
        plots=[_args_plot(results), _drafts_plot(results), _gate_plot(results)],
        tables=[_cost_table(results)],
        not_gated=[
            "Absolute seconds: they are of this machine and of what else it did.",
            "Over-optimisation of GenARM's weight: up to 8 the truth hardly falls from its best.",
            "The gap between ARGS and GenARM over lengths of 64 to 512 tokens: the kitchen's "
            "answers end by themselves after 30 to 70, so only the sign over those is looked at.",
        ],
    )


def _exactly(claim: str, found: float, wanted: float, slack: float = 0.01) -> Criterion:
    return Criterion(
        claim=claim,
        found=f"{found:.2f}",
        wanted=f"{wanted:g}",
        holds=abs(found - wanted) <= slack,
        hard=True,
    )


def _costs(results: Results, ratio: float) -> list[Criterion]:
    proxy = results["proxy"]
    per_token = {name: results[name].forwards_per_token for name in ("genarm", _ARGS, _TRANSFER)}
    most = 1 + _NUM_CANDIDATES
    rejects = 1 + proxy.notes["expected_rejects"]
    return [
        _exactly("GenARM: forwards per token, base and guide", per_token["genarm"], 2),
        _exactly("ARGS: forwards per token, base and ten candidates", per_token[_ARGS], most),
        at_least(
            "Transfer Q*: forwards per token, more than ARGS", per_token[_TRANSFER], most, hard=True
        ),
        at_least(
            f"Proxy-RLHF: forwards per token, at least the {rejects:.2f} of 1 + rejections",
            proxy.forwards_per_token,
            rejects - 0.01,
            hard=True,
        ),
        at_least(
            "Transfer Q*: seconds per answer, as a multiple of GenARM's", ratio, _SLOWER, hard=True
        ),
    ]


def _cost_table(results: Results) -> Table:
    names = {
        "base": "base",
        "genarm": "GenARM",
        "proxy": "Proxy-RLHF",
        _ARGS: "ARGS, k=10",
        _TRANSFER: "Transfer Q*, k=10",
        "best_of_16": "best of 16",
        "aligner": "Aligner",
        "dpo": "DPO",
    }
    rows = [
        [
            label,
            f"{1000 * results[name].seconds_per_answer:.0f}",
            f"{128 * results[name].seconds / sum(results[name].tokens):.3f}",
            f"{results[name].forwards_per_token:.2f}",
        ]
        for name, label in names.items()
    ]
    return Table(
        caption="Cost, up to 125 answers at a time on one CPU thread.",
        head=("method", "ms / answer", "s / 128 tokens", "forwards / token"),
        rows=rows,
    )


def best_of(scores_QN: np.ndarray, rewards_QN: np.ndarray, num: int) -> tuple[float, float]:
    """Return the expected score and reward [of Q questions] of the best of `num` out of N drafts.

    Exact over all choices of `num` drafts: the draft of rank k from below is the best one of
    `C(k - 1, num - 1)` of the `C(N, num)` choices.
    """
    total = scores_QN.shape[1]
    weights_N = np.zeros(total)
    weights_N[num - 1] = 1.0
    for rank in range(num, total):  # C(rank, num - 1) from C(rank - 1, num - 1)
        weights_N[rank] = weights_N[rank - 1] * rank / (rank - num + 1)
    weights_N /= weights_N.sum()
    order_QN = scores_QN.argsort(axis=1, kind="stable")
    ranked = [np.take_along_axis(one, order_QN, axis=1) for one in (scores_QN, rewards_QN)]
    score, reward = ((one * weights_N).sum(axis=1).mean() for one in ranked)
    return float(score), float(reward)


def _draft_curve(results: Results) -> list[tuple[int, float, float]]:
    drafts = results["drafts"]
    both = [np.reshape(column, (-1, NUM_DRAFTS)) for column in (drafts.scores, drafts.rewards)]
    nums = [2**power for power in range(int(np.log2(NUM_DRAFTS)) + 1)]
    return [(num, *best_of(both[0], both[1], num)) for num in nums]


def _over_optimisation(results: Results) -> list[Criterion]:
    scores = [results[args_name(weight)].mean("scores") for weight in ARGS_WEIGHTS]
    rewards = [results[args_name(weight)].mean("rewards") for weight in ARGS_WEIGHTS]
    best = int(np.argmax(rewards))
    curve = _draft_curve(results)
    first, last = curve[0][1:], curve[-1][1:]
    return [
        Criterion(
            claim="ARGS: the true reward rises with the weight, then falls",
            found=f"best at w={ARGS_WEIGHTS[best]:g}, score {scores[0]:+.2f} to {scores[-1]:+.2f}",
            wanted="best inside the range",
            holds=0 < best < len(ARGS_WEIGHTS) - 1,
        ),
        Criterion(
            claim=f"Best of N: the score rises to N={NUM_DRAFTS}, the truth by less",
            found=f"score {last[0] - first[0]:+.2f}, truth {last[1] - first[1]:+.2f}",
            wanted="truth by less",
            holds=last[1] - first[1] < last[0] - first[0]
            and all(after[1] > before[1] for before, after in itertools.pairwise(curve)),
        ),
    ]


def _args_plot(results: Results) -> Plot:
    figure, (left, right) = figures.new_figure(width=7.2, columns=2)
    sweeps = (
        (left, "ARGS, greedy", ARGS_WEIGHTS, "args_w"),
        (right, "GenARM, T=1", GENARM_WEIGHTS, "genarm_w"),
    )
    for axes, title, weights, prefix in sweeps:
        for colour, column, label in (
            (figures.BLUE, "rewards", "true reward"),
            (figures.ORANGE, "scores", "reward model's score"),
        ):
            values = [results[f"{prefix}{weight:g}"].mean(column) for weight in weights]
            axes.plot(weights, values, "o-", ms=4, color=colour, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(title)
        axes.set_xlabel("weight")
        axes.grid(alpha=0.25)
    figures.legend(left)
    return Plot(figure=figure, caption="Pushing harder: what is believed and what is true.")


def _drafts_plot(results: Results) -> Plot:
    curve = _draft_curve(results)
    lines = {
        "true reward": [(num, reward, 0.0) for num, _, reward in curve],
        "reward model's score": [(num, score, 0.0) for num, score, _ in curve],
    }
    figure = figures.curves(lines, x="drafts N", y="mean per answer", log=True)
    return Plot(
        figure=figure,
        caption=f"Best of N by the reward model, over all choices out of {NUM_DRAFTS} drafts.",
    )


def _gates(results: Results) -> list[tuple[float, float, float]]:
    """Return (share of tokens at which the guide acts, share of the dense gain, reward)."""
    base, dense = results["base"].reward.mean, results["genarm"].reward.mean
    found = [results[f"genarm_gate{gate:g}"] for gate in GATES]
    return [
        (one.notes["gate_open"], (one.reward.mean - base) / (dense - base), one.reward.mean)
        for one in found
    ]


def _gate(results: Results) -> Criterion:
    """The sparsest gate that keeps nine tenths."""
    kept = [open_share for open_share, share, _ in _gates(results) if share >= _KEPT]
    found = f"{min(kept):.0%} of the tokens" if kept else "none keeps it"
    return Criterion(
        claim="A gate that keeps 90% of GenARM's gain opens at about a quarter of the tokens",
        found=found,
        wanted="at most 35%",
        holds=bool(kept) and min(kept) <= _OPEN + 0.1,
    )


def _gate_plot(results: Results) -> Plot:
    points = sorted([(1.0, 1.0, 0.0), *_gates(results)])
    lines = {"GenARM": [(100 * share, 100 * kept, 0.0) for share, kept, _ in points]}
    figure = figures.curves(
        lines, x="tokens at which the guide acts, %", y="share of the gain kept, %"
    )
    figure.axes[0].set_ylim(bottom=0)
    thresholds = ", ".join(f"{gate:g}" for gate in GATES)
    return Plot(
        figure=figure,
        caption=f"GenARM behind a gate on the base's entropy: none, and at {thresholds} nats.",
    )


def _length(results: Results) -> Criterion:
    """Whether GenARM's lead over ARGS, at its best weight, grows with the length of its answer."""
    args, genarm = results[args_name(best_args(results))], results["genarm"]
    lengths_N = np.asarray(args.tokens, dtype=np.float64)
    leads_N = np.subtract(genarm.rewards, args.rewards)

    def slope(draw: np.ndarray) -> float:
        return float(np.polyfit(lengths_N[draw], leads_N[draw], 1)[0])

    low, high = interval([slope(draw) for draw in resamples(len(leads_N), 0)])
    value = slope(np.arange(len(leads_N)))
    return Criterion(
        claim="GenARM's lead over ARGS grows with the length of the answer (reward per ten tokens)",
        found=f"{10 * value:+.2f} [{10 * low:+.2f}, {10 * high:+.2f}]",
        wanted="> 0",
        holds=low > 0,
    )


SPEC = ChapterSpec(
    headline=(),
    methods=(
        *("base", "genarm", "proxy", "best_of_16", "aligner", "dpo", "drafts", _TRANSFER),
        *map(args_name, ARGS_WEIGHTS),
        *(f"genarm_w{weight:g}" for weight in GENARM_WEIGHTS),
        *(f"genarm_gate{gate:g}" for gate in GATES),
    ),
    write=write,
)
