"""GenARM: Xu et al., "GenARM: Reward Guided Generation with Autoregressive Reward Model for
Test-Time Alignment", ICLR 2025."""

import numpy as np

from jobs.reproduce import figures
from jobs.reproduce.chapter import (
    METHOD_HEAD,
    Chapter,
    ChapterSpec,
    Criterion,
    Evidence,
    Plot,
    Table,
    above,
    at_least,
    gain_text,
    method_rows,
)
from jobs.reproduce.chapters import front
from jobs.reproduce.measured import Results
from jobs.reproduce.seeds import gain_over_seeds, over_seeds
from jobs.reproduce.study import (
    ARGS_WEIGHTS,
    EQUAL_WEIGHT,
    GENARM_WEIGHTS,
    METHODS,
    args_name,
)
from pilotfish.evaluation.metrics import Comparison
from pilotfish.evaluation.pareto import (
    Interval,
    recovered_gap,
)

_ARGS = args_name(EQUAL_WEIGHT)
_TRANSFER = f"transfer_w{EQUAL_WEIGHT:g}"
_CONTROLS = {
    "base": "base, T=0.7",
    "base_t035": "base, T=0.35 (sharpened by w=1)",
    "base_t05": "base, T=0.5",
    "base_greedy": "base, greedy",
}
_COMPARED = {
    "genarm": "GenARM w=1, T=0.7",
    "genarm_greedy": "GenARM w=1, greedy",
    "dpo": "DPO, T=0.7",
    "dpo_greedy": "DPO, greedy",
    _TRANSFER: f"Transfer Q* w={EQUAL_WEIGHT:g}, greedy",
    "pargs": "PARGS w=6, greedy (a reward model taught on beginnings)",
    "best_of_16": "best of 16, T=1",
}
# On a base: (base, base guided by the xs guide, the DPO of that base).
_WEAK = {
    "base, T=0.7": ("base", "weak_base", "dpo"),
    "base, greedy": ("base_greedy", "weak_base_greedy", "dpo_greedy"),
    "larger base, T=0.7": ("base_m", "weak_base_m", "dpo_m"),
    "larger base, greedy": ("base_m_greedy", "weak_base_m_greedy", "dpo_m_greedy"),
}
_RECOVERED_HARD, _RECOVERED = 0.4, 0.7
_NEAR_DPO = 0.03


def write(evidence: Evidence) -> Chapter:
    """Write the chapter from what was measured."""
    results, seeds = evidence.results, evidence.num_seeds
    versus = results.gain("genarm", "dpo")
    return Chapter(
        title="GenARM",
        paper=(
            "Xu et al., “GenARM: Reward Guided Generation with Autoregressive Reward Model for "
            "Test-Time Alignment”, ICLR 2025"
        ),
        claim=(
            "A reward model that is itself a language model guides a frozen base token by token, "
            "for one more forward, as well as training the base would; a weak one guides a strong "
            "base, and several mix by their weights."
        ),
        published=(
            "51.44% wins and half ties against DPO; Transfer Q* 33.72, ARGS 26.89 (HH-RLHF, 7B, a "
            "survey's table); more than 70% of the gap to a DPO-trained 70B recovered by a 7B guide"
        ),
        ours=(
            f"{_rate(versus)} % wins and half ties against DPO; reward "
            f"{over_seeds(results, 'genarm', seeds)} beside {over_seeds(results, 'dpo', seeds)}"
        ),
        criteria=[*_criteria(evidence), *_weak_criteria(results), *front.criteria(results)],
        plots=[
            _against_kl(results),
            _against_weight(results),
            _weak_plot(results),
            front.plot(results),
        ],
        tables=[
            Table(
                caption="Every method on the same questions.",
                head=METHOD_HEAD,
                rows=method_rows(results, _labels(results)),
            ),
            _versus_dpo(results),
            _weak_table(results),
            front.table(results),
        ],
        not_gated=[
            "PARM above GenARM: the literature contradicts itself.",
            "CARDS: not built here, so only its place in the published order is known.",
            "Seconds: only forwards per token are asked for. Seconds are of one shared CPU.",
            "The base for the two-objective front is one seed; so is every soup and MORL.",
        ],
    )


def _criteria(evidence: Evidence) -> list[Criterion]:
    results, seeds = evidence.results, evidence.num_seeds
    gains = [
        above(
            f"The mean reward is above {label} (mean over seeds)",
            gain_over_seeds(results, "genarm", name, seeds),
            hard=True,
        )
        for name, label in _CONTROLS.items()
    ]
    versus, best = results.gain("genarm", "dpo"), best_args(results)
    return [
        *gains,
        above(
            f"GenARM is above ARGS at its best weight (w={best:g})",
            results.gain("genarm", args_name(best)),
            hard=True,
        ),
        above("GenARM is above Transfer Q*", results.gain("genarm", _TRANSFER)),
        above(
            f"Transfer Q* is above ARGS at the same weight (w={EQUAL_WEIGHT:g})",
            results.gain(_TRANSFER, _ARGS),
            hard=True,
        ),
        above("GenARM is above best of 16", results.gain("genarm", "best_of_16")),
        Criterion(
            claim="GenARM is within 3 points of DPO, wins and half ties",
            found=f"{100 * versus.win_rate:.1f}%",
            wanted="47% to 53%, or more",
            holds=versus.win_rate >= 0.5 - _NEAR_DPO,
        ),
        Criterion(
            claim="At DPO's own divergence from the base, GenARM earns as much",
            found=f"{_matched(results):+.2f} at {results['dpo_t1'].mean('kl'):.2f} nats; DPO "
            f"{results['dpo_t1'].reward}",
            wanted="within two standard errors, or more",
            holds=_matched(results)
            >= results["dpo_t1"].reward.mean - 2 * results["dpo_t1"].reward.error,
        ),
    ]


def best_args(results: Results) -> float:
    """Return the weight at which ARGS earns most on these very questions, which favours it."""
    return max(ARGS_WEIGHTS, key=lambda weight: results[args_name(weight)].reward.mean)


def _labels(results: Results) -> dict[str, str]:
    args = [_ARGS, args_name(best_args(results))]
    greedy = {name: f"{METHODS[name].label}, greedy" for name in args}
    return {**_CONTROLS, **_COMPARED, **greedy}


def _matched(results: Results) -> float:
    """Return GenARM's reward where its divergence is DPO's, between the weights measured."""
    points = [_kl_and_reward(results, name) for name in _sweep()]
    kl, rewards = zip(*sorted(points), strict=True)
    return float(np.interp(results["dpo_t1"].mean("kl"), kl, rewards))


def _sweep() -> list[str]:
    return [f"genarm_w{weight:g}" for weight in GENARM_WEIGHTS]


def _kl_and_reward(results: Results, name: str) -> tuple[float, float]:
    return results[name].mean("kl"), results[name].reward.mean


def _against_kl(results: Results) -> Plot:
    groups = {
        "GenARM, w from 0.25 to 8": [_kl_and_reward(results, name) for name in _sweep()],
        "DPO": [_kl_and_reward(results, "dpo_t1")],
        "base": [(0.0, results["base_t1"].reward.mean)],
    }
    figure = figures.scatter(groups, x="KL to the base, nats per answer", y="true reward")
    return Plot(
        figure=figure,
        caption="Reward against how far an answer's law has moved from the base's, all at T=1.",
    )


def _against_weight(results: Results) -> Plot:
    lines = {
        "true reward": [
            (weight, results[name].reward.mean, results[name].reward.error)
            for weight, name in zip(GENARM_WEIGHTS, _sweep(), strict=True)
        ]
    }
    figure = figures.curves(lines, x="weight w = 1/β", y="true reward", log=True)
    return Plot(figure=figure, caption="Reward against the weight on the guide, at T=1.")


def _versus_dpo(results: Results) -> Table:
    rows = []
    for name, label in _labels(results).items():
        if name == "dpo":
            continue
        versus = results.gain(name, "dpo")
        num = versus.wins + versus.ties + versus.losses
        counts = [f"{one / num:.1%}" for one in (versus.wins, versus.ties, versus.losses)]
        share = _rate(versus)
        rows.append([label, *counts, share, gain_text(versus)])
    return Table(
        caption="Against DPO at T=0.7, question by question, judged by the true reward.",
        head=("method", "win", "tie", "loss", "win + ½ tie, %", "gain in reward"),
        rows=rows,
    )


def _rate(versus: Comparison) -> str:
    low, high = 100 * versus.win_rate_low, 100 * versus.win_rate_high
    return f"{100 * versus.win_rate:.1f} [{low:.1f}, {high:.1f}]"


def _gaps(results: Results) -> dict[str, Interval]:
    return {
        label: recovered_gap(*(results[name].rewards for name in names))
        for label, names in _WEAK.items()
    }


def _weak_criteria(results: Results) -> list[Criterion]:
    gaps = _gaps(results)
    large = [gap for label, gap in gaps.items() if label.startswith("larger")]
    least = min(gap.value for gap in large)
    claim = (
        "A guide of an eighth of its size recovers the larger base's gap to its DPO (the lesser of "
        "sampled and greedy)"
    )
    return [
        at_least(claim, least, _RECOVERED_HARD, hard=True),
        at_least(f"{claim}, as much as published", least, _RECOVERED),
    ]


def _weak_table(results: Results) -> Table:
    gaps = _gaps(results)
    rows = [
        [label, *(str(results[name].reward) for name in names), str(gaps[label])]
        for label, names in _WEAK.items()
    ]
    weak = [str(results[name].reward) for name in ("base_xs", "weak_base_xs")]
    return Table(
        caption=(
            "Weak to strong: the guide is of the smallest size, and was started from the smallest "
            "base."
        ),
        head=("base", "alone", "with the xs guide", "DPO of this base", "recovered share"),
        rows=[*rows, ["smaller base, T=0.7", *weak, "-", "-"]],
    )


def _weak_plot(results: Results) -> Plot:
    names = {
        "smaller base": "base_xs",
        "smaller + xs guide": "weak_base_xs",
        "base": "base",
        "base + xs guide": "weak_base",
        "base, DPO": "dpo",
        "larger base": "base_m",
        "larger + xs guide": "weak_base_m",
        "larger, DPO": "dpo_m",
    }
    colours = [
        figures.BLUE if "guide" in label else figures.ORANGE if "DPO" in label else figures.GREY
        for label in names
    ]
    rows = [
        (label, results[n].reward.mean, 1.96 * results[n].reward.error)
        for label, n in names.items()
    ]
    figure = figures.bars(rows, "true reward, T=0.7 (95%)", colours)
    return Plot(figure=figure, caption="One small guide on three bases of three sizes.")


SPEC = ChapterSpec(
    headline=("genarm", "dpo"),
    methods=(
        *_CONTROLS,
        *_COMPARED,
        *map(args_name, ARGS_WEIGHTS),
        *("base_t1", "dpo_t1", *_sweep()),
        *(name for names in _WEAK.values() for name in names),
        *("base_xs", "weak_base_xs"),
        *front.METHODS,
    ),
    write=write,
)
