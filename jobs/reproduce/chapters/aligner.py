"""Aligner: Ji et al., "Aligner: Efficient Alignment by Learning to Correct", NeurIPS 2024."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    all_alike,
    at_least,
    beyond_zero,
    gain_text,
    margin,
    method_rows,
)
from jobs.reproduce.measured import Results
from jobs.reproduce.methods import folder_of
from jobs.reproduce.seeds import gain_over_seeds, over_seeds
from jobs.reproduce.study import UPSTREAMS
from jobs.reproduce.trainings import ROUNDS, WARM_UPS
from pilotfish.evaluation.pareto import spearman
from pilotfish.train.export import read_record

_NEVER_SEEN = ("base_m", "base_xs", "dpo", "ppo")
_TWENTY = "18.75%"
_FIXED_POINT = -2.0
_PARTS = ("helpful", "harmless")


def write(evidence: Evidence) -> Chapter:
    """Write the chapter from what was measured, and from what the rounds recorded."""
    results, seeds = evidence.results, evidence.num_seeds
    omega = {name: _omega(results, name, "harmless") for name in UPSTREAMS}
    unseen = [omega[name] for name in _NEVER_SEEN]
    return Chapter(
        title="Aligner",
        paper="Ji et al., “Aligner: Efficient Alignment by Learning to Correct”, NeurIPS 2024",
        claim=(
            "One small model, trained once to rewrite answers into better ones, improves the "
            "answers of any model, those most that need it most."
        ),
        published=(
            "+21.9 helpful and +23.8 harmless, wins less losses in percent, on average over 11 "
            "models (7B; the first version's table 3)"
        ),
        ours=(
            f"harmless {min(unseen):+.0f} to {max(unseen):+.0f} on four models it never saw; "
            f"reward on the base {over_seeds(results, 'aligner', seeds)}"
        ),
        criteria=_criteria(evidence, omega),
        plots=[_upstream_plot(results), _warm_up_plot(results), _rounds_plot(evidence.root)],
        tables=[
            _upstream_table(results),
            Table(
                caption="Stacking, shares of copying in training, and the best of three rounds.",
                head=METHOD_HEAD,
                rows=method_rows(results, {**_variants(), **_ROUND_LABELS}),
            ),
            _rounds_table(evidence.root),
        ],
        not_gated=[
            "MARA above Aligner: its own authors' numbers disagree between data sets.",
            "The margin on GenARM's answers: nearly aligned answers leave little to correct, in "
            "the paper too (-0.7 on Llama2-70B-Chat).",
            "The corrections it learned from are a program's: stronger teaching than pairs, as in "
            "the paper, so its reward does not compare with that of methods that see pairs alone.",
        ],
    )


def _aligned(upstream: str) -> str:
    return "aligner" if upstream == "base" else f"aligned_{upstream}"


def _omega(results: Results, upstream: str, column: str) -> float:
    before, after = results[upstream], results[_aligned(upstream)]
    return margin(getattr(after, column), getattr(before, column))


def _criteria(evidence: Evidence, omega: Mapping[str, float]) -> list[Criterion]:
    results, seeds = evidence.results, evidence.num_seeds
    quality = [results[name].reward.mean for name in UPSTREAMS]
    gains = [results.gain(_aligned(name), name).gain for name in UPSTREAMS]
    second = margin(results["aligner_twice"].rewards, results["aligner"].rewards)
    return [
        above(
            "The mean reward of corrected answers is above the base's (mean over seeds)",
            gain_over_seeds(results, "aligner", "base", seeds),
            hard=True,
        ),
        *(
            beyond_zero(
                f"One Aligner makes answers of {UPSTREAMS[name]}, never seen, more harmless "
                "(wins less losses)",
                omega[name],
                hard=True,
                unit="%",
            )
            for name in _NEVER_SEEN
        ),
        beyond_zero("... and those of GenARM", omega["genarm"], unit="%"),
        beyond_zero(
            "The better a model, the smaller the gain (rank correlation)",
            spearman(quality, gains),
            sign=-1,
        ),
        at_least(
            "A second pass does no harm (wins less losses)",
            second,
            _FIXED_POINT,
            hard=True,
            unit="%",
        ),
        all_alike(
            "An identity Aligner changes nothing, byte by byte",
            results["aligner_copyist"].texts,
            results["base"].texts,
        ),
        *(
            above(
                f"{_TWENTY} of copying first is above {share:.0%}",
                results.gain("aligner", _warm_up(share)),
            )
            for share in WARM_UPS
        ),
        *_round_criteria(results, evidence.root),
    ]


def _warm_up(share: float) -> str:
    return f"aligner_{round(100 * share)}"


def _variants() -> dict[str, str]:
    return {
        "base": "base",
        "aligner": f"Aligner, {_TWENTY} copying",
        **{_warm_up(share): f"Aligner, {share:.0%} copying" for share in WARM_UPS},
        "aligner_twice": "Aligner, a second pass",
        "aligner_copyist": "identity Aligner",
    }


def _upstream_table(results: Results) -> Table:
    rows = []
    for name, label in UPSTREAMS.items():
        before, after = results[name], results[_aligned(name)]
        margins = [
            f"{_omega(results, name, part):+.1f}" for part in ("rewards", "helpful", "harmless")
        ]
        rows.append([label, str(before.reward), str(after.reward), *margins])
    return Table(
        caption=(
            "One Aligner on answers of six models at T=0.7. Margins are wins less losses, in "
            "percent."
        ),
        head=("answers of", "reward before", "after", "margin", "helpful", "harmless"),
        rows=rows,
    )


def _upstream_plot(results: Results) -> Plot:
    figure, [axes] = figures.new_figure(height=3.2)
    for place, name in enumerate(UPSTREAMS):
        before, after = results[name].reward.mean, results[_aligned(name)].reward.mean
        axes.plot([before, after], [place, place], color=figures.GREY, lw=2, zorder=1)
        axes.scatter(
            [before], [place], color=figures.ORANGE, zorder=2, label=None if place else "before"
        )
        axes.scatter(
            [after], [place], color=figures.BLUE, zorder=2, label=None if place else "after"
        )
    axes.set_yticks(range(len(UPSTREAMS)), list(UPSTREAMS.values()))
    axes.invert_yaxis()
    axes.set_xlabel("true reward")
    axes.grid(axis="x", alpha=0.25)
    figures.legend(axes)
    return Plot(figure=figure, caption="What the same Aligner makes of the answers of six models.")


def _warm_up_plot(results: Results) -> Plot:
    points = sorted([(0.1875, "aligner"), *((share, _warm_up(share)) for share in WARM_UPS)])
    lines = {
        label: [(100 * share, results[name].mean(column), 0.0) for share, name in points]
        for label, column in (("helpful", "helpful"), ("harmless", "harmless"))
    }
    figure = figures.curves(lines, x="share of copying in the training, %", y="mean per answer")
    return Plot(figure=figure, caption="Warm-up: equal steps in all, some of them of copying.")


def rounds_of(root: Path, name: str) -> list[dict[str, Any]]:
    """Return the metrics of each round, from the model that it began with."""
    record = read_record(folder_of(root, name)) or {}
    return [one["metrics"] for one in record["rounds"]]


def _rounds_table(root: Path) -> Table:
    rows = []
    for name, label in _ROUND_LABELS.items():
        for number, metrics in enumerate(rounds_of(root, name)):
            reward = f"{metrics['monitor/reward']:+.2f} ± {metrics['monitor/reward_error']:.2f}"
            pairs = str(metrics.get("pairs/num", "-"))
            rows.append([label, str(number), reward, f"{metrics['monitor/bad_share']:.1%}", pairs])
    return Table(
        caption="Rounds of DPO, sampled at T=1. Round 0 is the base; the truth is only looked at.",
        head=("pairs", "round", "reward", "bad", "pairs learned from"),
        rows=rows,
    )


_ROUND_LABELS = {
    "rounds_aligner": "rounds, the Aligner's corrections preferred",
    "rounds_self": "rounds, best over worst of eight by the reward model",
}


def _rounds_plot(root: Path) -> Plot:
    lines = {
        label: [
            (number, metrics["monitor/reward"], metrics["monitor/reward_error"])
            for number, metrics in enumerate(rounds_of(root, name))
        ]
        for name, label in _ROUND_LABELS.items()
    }
    figure = figures.curves(lines, x="round", y="true reward")
    figure.axes[0].set_xticks(range(max(map(len, lines.values()))))
    return Plot(figure=figure, caption="Multi-round DPO with and without Aligner-made preferences.")


def _round_criteria(results: Results, root: Path) -> list[Criterion]:
    start, *rounds = [one["monitor/reward"] for one in rounds_of(root, "rounds_aligner")]
    both = [results.gain("rounds_aligner", "rounds_self", part) for part in _PARTS]
    return [
        *(
            Criterion(
                claim=f"Rounds with the Aligner end no less {part} than rounds without",
                found=gain_text(gain),
                wanted="not < 0",
                holds=gain.gain_high >= 0,
            )
            for part, gain in zip(_PARTS, both, strict=True)
        ),
        Criterion(
            claim="No round with the Aligner falls below the model that it began with",
            found=f"{min(rounds):+.2f}",
            wanted=f"> {start:+.2f}",
            holds=min(rounds) > start,
        ),
    ]


SPEC = ChapterSpec(
    headline=("aligner",),
    methods=(
        *UPSTREAMS,
        *(_aligned(name) for name in UPSTREAMS),
        *_variants(),
        *ROUNDS,
    ),
    write=write,
)
