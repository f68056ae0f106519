"""Transfer Q*: Chakraborty et al., "Transfer Q Star: Principled Decoding for LLM Alignment",
NeurIPS 2024."""

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
    gain_text,
    method_rows,
)
from jobs.reproduce.enumerated import ALPHA, BETA, HORIZON, NUM_TOKENS, NUM_WORLDS, play
from jobs.reproduce.measured import Results
from jobs.reproduce.study import EQUAL_WEIGHT, NUM_INDIRECT, TRANSFER_WEIGHTS, args_name
from pilotfish.evaluation.metrics import compare, estimate

_TRANSFER = f"transfer_w{EQUAL_WEIGHT:g}"
_ARGS = args_name(EQUAL_WEIGHT)
_EQUAL = {
    _TRANSFER: f"Transfer Q* w={EQUAL_WEIGHT:g}",
    "cd_equal": f"controlled decoding w={EQUAL_WEIGHT:g}",
    _ARGS: f"ARGS w={EQUAL_WEIGHT:g}",
}
_INDIRECT = {"transfer_naive": "direct, as if r were r_BL", "transfer_indirect": "indirect"}
_VALUES = ("Transfer Q*", "CD", "ARGS", "direct, naive", "indirect")
_RULES = {"alpha": "at equal alpha", "greedy": "greedy"}


def write(evidence: Evidence) -> Chapter:
    """Write the chapter from what was measured, and from the enumerated worlds."""
    results, worlds = evidence.results, play()
    against = compare(worlds["Transfer Q*, alpha"], worlds["CD, alpha"])
    num = len(results[_TRANSFER].texts)
    few = min(len(results["transfer_naive"].texts), NUM_INDIRECT)
    return Chapter(
        title="Transfer Q*",
        paper=(
            "Chakraborty et al., “Transfer Q Star: Principled Decoding for LLM Alignment”, "
            "NeurIPS 2024"
        ),
        claim=(
            "The value of a token is what an already aligned model would earn after it. That "
            "value guides better than one of the base's own continuations (controlled decoding) "
            "or the reward of an unfinished text (ARGS)."
        ),
        published=(
            "up to 1.45 times the average reward of controlled decoding, and 67.34% win-tie "
            "against it (abstract)"
        ),
        ours=(
            f"{gain_text(against)} in exact expected reward over controlled decoding at equal "
            f"alpha, in {against.wins} of {NUM_WORLDS} enumerated worlds"
        ),
        criteria=_criteria(results, worlds),
        plots=[_worlds_plot(worlds), _deviation(results)],
        tables=[
            _worlds_table(worlds),
            Table(
                caption=(
                    "The kitchen at equal weight, greedy, ten candidates; Transfer Q* on the first "
                    f"{num} questions."
                ),
                head=METHOD_HEAD,
                rows=method_rows(results, _EQUAL),
            ),
            Table(
                caption=(
                    "Rollouts of a model aligned to helpfulness alone, for the sum of both "
                    f"rewards: four sampled rollouts, five candidates, {few} questions."
                ),
                head=METHOD_HEAD,
                rows=method_rows(results, _INDIRECT),
            ),
        ],
        not_gated=[
            "Transfer Q* above controlled decoding at matched KL: in enumerated worlds it is not.",
            "The published 1.45 times: an exact factor of other models and other rewards.",
            "The kitchen's order of the three: the reward models differ, each of one seed, so the "
            "order is asked for where everything is exact.",
        ],
    )


def _criteria(results: Results, worlds: dict[str, list[float]]) -> list[Criterion]:
    pairs = (("Transfer Q*", "CD"), ("CD", "ARGS"), ("indirect", "direct, naive"))
    exact = [
        above(
            f"{one} is above {other} in exact expectation, {_RULES[rule]}",
            compare(worlds[f"{one}, {rule}"], worlds[f"{other}, {rule}"]),
            hard=True,
        )
        for one, other in pairs
        for rule in _RULES
    ]
    return [
        *exact,
        above(
            "In the kitchen, Transfer Q* is above the greedy base",
            results.gain(_TRANSFER, "base_greedy"),
            hard=True,
        ),
        above(
            "... and above the sampled base at T=0.7", results.gain(_TRANSFER, "base"), hard=True
        ),
        above(
            "In the kitchen, Transfer Q* is above controlled decoding",
            results.gain(_TRANSFER, "cd_equal"),
        ),
        above("In the kitchen, controlled decoding is above ARGS", results.gain("cd_equal", _ARGS)),
        above(
            "In the kitchen, indirect is above direct where r is not r_BL",
            results.gain("transfer_indirect", "transfer_naive"),
        ),
    ]


def _worlds_table(worlds: dict[str, list[float]]) -> Table:
    return Table(
        caption=(
            f"Exact expected reward, mean over {NUM_WORLDS} random worlds of {HORIZON} tokens out "
            f"of {NUM_TOKENS}; alpha={ALPHA:g}, models aligned with beta={BETA:g}. The last two "
            "roll out a model that was aligned to another reward."
        ),
        head=("value of a token", "at equal alpha", "greedy"),
        rows=[
            [name, *(str(estimate(worlds[f"{name}, {rule}"])) for rule in _RULES)]
            for name in _VALUES
        ],
    )


def _worlds_plot(worlds: dict[str, list[float]]) -> Plot:
    found = [(name, estimate(worlds[f"{name}, alpha"])) for name in _VALUES]
    rows = [(name, one.mean, 1.96 * one.error) for name, one in found]
    colours = [figures.BLUE, figures.ORANGE, figures.GREEN, figures.GREY, figures.BLUE]
    return Plot(
        figure=figures.bars(rows, "exact expected reward at equal alpha (95%)", colours),
        caption="Enumerated worlds. The upper three know what the model was aligned to.",
    )


def _deviation(results: Results) -> Plot:
    lines = {}
    for label, read in (("true reward", "rewards"), ("reward model's score", "scores")):
        lines[label] = [
            (weight, one.mean, one.error)
            for weight in TRANSFER_WEIGHTS
            for one in [estimate(getattr(results[f"transfer_w{weight:g}"], read))]
        ]
    return Plot(
        figure=figures.curves(lines, x="weight w = 1/alpha", y="mean per answer", log=True),
        caption="The knob of deviation: how much the value counts beside the base, greedy.",
    )


SPEC = ChapterSpec(
    headline=(),
    methods=(
        *("base", "base_greedy"),
        *_EQUAL,
        *_INDIRECT,
        *(f"transfer_w{weight:g}" for weight in TRANSFER_WEIGHTS),
    ),
    write=write,
)
