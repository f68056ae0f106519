"""Proxy-RLHF: Zhu et al., "Proxy-RLHF: Decoupling Generation and Alignment in Large Language Model
with Proxy", 2024."""

from pathlib import Path

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
    at_most,
    gain_text,
    method_rows,
)
from jobs.reproduce.chapters import knobs
from jobs.reproduce.measured import Results
from jobs.reproduce.methods import UNSEEN_DISHES, UNSEEN_NAMES, folder_of
from jobs.reproduce.seeds import gain_over_seeds, names_of, over_seeds
from jobs.reproduce.trainings import ALL_PROXY_PROMPTS, PROXY_PROMPTS
from pilotfish.evaluation.pareto import decile_shifts
from pilotfish.train.export import read_record

_CONTROLS = {"base_t1": "base, T=1", "base": "base, T=0.7", "base_greedy": "base, greedy"}
_ABLATIONS = {
    "proxy": "as it is",
    "proxy_free": "restriction off (p_t=0)",
    "proxy_iid": "order off (iid)",
    "proxy_literal": "literal rule",
}
_UNSEEN = {
    "unseen_base": "base, T=1",
    "unseen_proxy": "trained with them",
    "unseen_proxy_seen": "never met them",
}
_MOST_SHARE = 0.01
_COLLAPSED = 0.5


def write(evidence: Evidence) -> Chapter:
    """Write the chapter from what was measured."""
    results, seeds = evidence.results, evidence.num_seeds
    gain = gain_over_seeds(results, "proxy", "base_t1", seeds)
    rewards = {"base, T=1": results["base_t1"].rewards, "Proxy-RLHF": results["proxy"].rewards}
    return Chapter(
        title="Proxy-RLHF",
        paper=(
            "Zhu et al., “Proxy-RLHF: Decoupling Generation and Alignment in Large Language "
            "Model with Proxy”, 2024"
        ),
        claim=(
            "A tiny network that accepts or rejects the tokens which a frozen model proposes "
            "aligns it about as well as RLHF, with about 1% of the trained parameters."
        ),
        published=(
            "0.03B trained parameters beside 13.35B of RLHF on LLaMA-7B, that is 0.2% (a summary "
            "of the paper; “only 1%” in its abstract)"
        ),
        ours=(
            f"{_parameters(evidence.root)['proxy']:,} parameters; reward "
            f"{over_seeds(results, 'proxy', seeds)} from {results['base_t1'].reward}, a gain of "
            f"{gain_text(gain)}"
        ),
        criteria=_criteria(evidence),
        plots=[
            Plot(
                figure=figures.histograms(rewards, "true reward of an answer"),
                caption="Rewards of single answers to the same questions, and their deciles.",
            ),
            knobs.heatmap(evidence.root),
            _data_curve(results),
            _ablation(results),
        ],
        tables=_tables(evidence),
        not_gated=[
            "Whether more hidden units help: the proxy is kept below 1% of the base.",
            "p_t is our reading of a rule that no public text states; here it is a floor on the "
            "probability of what may be offered. The rule taken by its letter is in the ablation.",
            "An untrained proxy already narrows what the base says, so it is compared with the "
            "best way to decode the base alone, not only with sampling at temperature 1.",
        ],
    )


def _tables(evidence: Evidence) -> list[Table]:
    results = evidence.results
    labels = {**_CONTROLS, "proxy_untrained": "untrained proxy", "proxy": "Proxy-RLHF"}
    return [
        Table(
            caption="The proxy and its controls.",
            head=METHOD_HEAD,
            rows=method_rows(results, labels),
        ),
        _parameter_table(evidence.root),
        Table(
            caption=(
                f"Unseen prompts: questions of {' and '.join(UNSEEN_NAMES)} about "
                f"{' and '.join(UNSEEN_DISHES)}. One proxy was trained without any question "
                "about these names or dishes."
            ),
            head=METHOD_HEAD,
            rows=method_rows(results, _UNSEEN),
        ),
        _overhead(results),
    ]


def _criteria(evidence: Evidence) -> list[Criterion]:
    results, seeds = evidence.results, evidence.num_seeds
    base = results["base_t1"].rewards
    lowest = [
        min(x.low for x in decile_shifts(results[name].rewards, base))
        for name in names_of("proxy", seeds)
    ]
    best = max(_CONTROLS, key=lambda name: results[name].reward.mean)
    untrained = results.gain("proxy_untrained", best)
    parameters = _parameters(evidence.root)
    return [
        above(
            "The mean reward is above the base's (mean over seeds)",
            gain_over_seeds(results, "proxy", "base_t1", seeds),
            hard=True,
        ),
        Criterion(
            claim="Every decile of the reward moves right, for every seed (lowest end)",
            found=f"{min(lowest):+.2f}",
            wanted="> 0",
            holds=min(lowest) > 0,
            hard=True,
        ),
        above(
            f"It is also above the best the base does alone ({_CONTROLS[best]})",
            gain_over_seeds(results, "proxy", best, seeds),
            hard=True,
        ),
        Criterion(
            claim=f"An untrained proxy is not above the best of the base alone ({_CONTROLS[best]})",
            found=gain_text(untrained),
            wanted="not > 0",
            holds=untrained.gain_low <= 0,
            hard=True,
        ),
        at_most(
            "Trained parameters, as a share of the base's",
            100 * parameters["proxy"] / parameters["base"],
            100 * _MOST_SHARE,
            hard=True,
            unit="%",
        ),
        all_alike(
            "With p_t=0 the proxy has no say: nucleus rule, the greedy base",
            results["proxy_off"].texts,
            results["base_greedy"].texts,
        ),
        all_alike(
            "With p_t=0 the proxy has no say: order iid, the sampled base",
            results["proxy_off_iid"].texts,
            results["base_t1"].texts,
        ),
        *_soft(evidence),
    ]


def _soft(evidence: Evidence) -> list[Criterion]:
    results = evidence.results
    return [
        knobs.interior(evidence.root),
        knobs.tuned(evidence.root),
        at_least("Share of the gain with half of the prompts", _half_share(results), 0.8),
        at_least(
            "The literal rule collapses: share of garbled answers",
            results["proxy_literal"].bad_share,
            _COLLAPSED,
        ),
        above(
            "It helps with names and dishes that it never met",
            results.gain("unseen_proxy_seen", "unseen_base"),
        ),
    ]


def _half_share(results: Results) -> float:
    base = results["base_t1"].reward.mean
    half = PROXY_PROMPTS[-1]
    return (results[f"proxy_{half}"].reward.mean - base) / (results["proxy"].reward.mean - base)


def _data_curve(results: Results) -> Plot:
    points = [
        *((num, results[f"proxy_{num}"].reward) for num in PROXY_PROMPTS),
        (ALL_PROXY_PROMPTS, results["proxy"].reward),
    ]
    base = results["base_t1"].reward
    lines = {
        "Proxy-RLHF": [(num, one.mean, one.error) for num, one in points],
        "base, T=1": [(num, base.mean, base.error) for num, _ in points],
    }
    figure = figures.curves(lines, x="different prompts in training", y="true reward", log=True)
    return Plot(
        figure=figure,
        caption="Data efficiency: as many updates each time, over fewer different prompts.",
    )


def _ablation(results: Results) -> Plot:
    names = ["base_t1", *_ABLATIONS]
    lines = {
        "true reward": [(i, results[name].reward.mean, 0.0) for i, name in enumerate(names)],
        "reward model's score": [
            (i, results[name].mean("scores"), 0.0) for i, name in enumerate(names)
        ],
    }
    figure, [axes] = figures.new_figure()
    for shift, colour, (label, points) in zip(
        (-0.2, 0.2), (figures.BLUE, figures.ORANGE), lines.items(), strict=True
    ):
        axes.bar(
            [x + shift for x, _, _ in points],
            [y for _, y, _ in points],
            width=0.38,
            color=colour,
            label=label,
        )
    shown = ["base", "as it is", "restriction\noff", "order off\n(iid)", "literal\nrule"]
    axes.set_xticks(range(len(names)), shown)
    axes.axhline(0, color=figures.GREY, lw=0.8)
    axes.set_ylabel("mean per answer")
    figures.legend(axes)
    broken = {label: f"{results[name].bad_share:.0%}" for name, label in _ABLATIONS.items()}
    return Plot(
        figure=figure,
        caption=(
            "Without parts of the knowledge-aware module, each trained anew. Where the reward "
            "model's score rises and the truth falls, the proxy has left the language. Broken "
            f"answers: {', '.join(f'{label} {share}' for label, share in broken.items())}."
        ),
    )


def _parameters(root: Path) -> dict[str, int]:
    """Return what each training has trained."""
    return {
        stage: int((read_record(folder_of(root, stage)) or {})["metrics"]["trainable_parameters"])
        for stage in ("base", "proxy", "dpo", "ppo")
    }


def _parameter_table(root: Path) -> Table:
    trained = _parameters(root)
    labels = {"proxy": "Proxy-RLHF", "dpo": "DPO", "ppo": "PPO-RLHF (policy and critic)"}
    return Table(
        caption="Trained parameters.",
        head=("method", "trained", "share of the base"),
        rows=[
            [label, f"{trained[name]:,}", f"{trained[name] / trained['base']:.2%}"]
            for name, label in labels.items()
        ],
    )


def _overhead(results: Results) -> Table:
    base, proxy = results["base_t1"], results["proxy"]
    return Table(
        caption="What accepting and rejecting costs, on one CPU.",
        head=("method", "tokens / s", "forwards / token", "rejections / token"),
        rows=[
            ["base", f"{base.tokens_per_second:.0f}", f"{base.forwards_per_token:.2f}", "-"],
            [
                "Proxy-RLHF",
                f"{proxy.tokens_per_second:.0f}",
                f"{proxy.forwards_per_token:.2f}",
                f"{proxy.notes['expected_rejects']:.2f}",
            ],
        ],
    )


SPEC = ChapterSpec(
    headline=("proxy",),
    methods=(
        *_CONTROLS,
        *_ABLATIONS,
        *_UNSEEN,
        *("proxy_untrained", "proxy_off", "proxy_off_iid"),
        *(f"proxy_{num}" for num in PROXY_PROMPTS),
    ),
    stages=("dpo", "ppo", "search_proxy"),
    write=write,
)
