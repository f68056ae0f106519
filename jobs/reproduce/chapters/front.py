"""Two rewards that pull apart: the front of mixed guides beside Rewarded Soups and MORL."""

from jobs.reproduce import figures
from jobs.reproduce.chapter import Criterion, Plot, Table, all_alike, at_least
from jobs.reproduce.measured import Results
from jobs.reproduce.study import MIX_WEIGHTS, mix_name
from jobs.reproduce.trainings import MORL_SIDES, SOUP_WEIGHTS, soup_name
from pilotfish.evaluation.pareto import Point, hypervolume, mip, worst_point

_SOUPS = {
    0.0: "dpo_harmless",
    **{weight: soup_name(weight) for weight in SOUP_WEIGHTS},
    0.5: "soup",
    1.0: "dpo_helpful",
}
_MORL = {0.0: "morl_harmless", 0.5: "morl", 1.0: "morl_helpful"}

METHODS = (
    *(mix_name(weight) for weight in MIX_WEIGHTS),
    *(f"only_{side}" for side in MORL_SIDES),
    *_SOUPS.values(),
    *_MORL.values(),
)


def _fronts(results: Results) -> dict[str, dict[float, Point]]:
    """Return (helpful, harmless) by the weight on the helpful side."""

    def points(names: dict[float, str]) -> dict[float, Point]:
        return {
            weight: (results[name].mean("helpful"), results[name].mean("harmless"))
            for weight, name in sorted(names.items())
        }

    return {
        "GenARM": points({weight: mix_name(weight) for weight in MIX_WEIGHTS}),
        "Rewarded Soups": points(_SOUPS),
        "MORL": points(_MORL),
    }


def criteria(results: Results) -> list[Criterion]:
    fronts = _fronts(results)
    every = {name: list(front.values()) for name, front in fronts.items()}
    worst = worst_point(*every.values())
    volumes = {name: hypervolume(points, worst) for name, points in every.items()}
    at_morl = [fronts["GenARM"][weight] for weight in _MORL]
    share = hypervolume(at_morl, worst) / volumes["MORL"]
    ends = [
        all_alike(
            f"All weight on {side}: the mix is the single guide exactly",
            results[mix_name(weight)].texts,
            results[f"only_{side}"].texts,
        )
        for weight, side in ((1.0, "helpful"), (0.0, "harmless"))
    ]
    return [
        *ends,
        Criterion(
            claim="Hypervolume of the mixes beside Rewarded Soups, at five weights",
            found=f"{volumes['GenARM']:.2f} and {volumes['Rewarded Soups']:.2f}",
            wanted="larger",
            holds=volumes["GenARM"] > volumes["Rewarded Soups"],
        ),
        at_least(
            "Hypervolume of the mixes as a share of MORL's, at its three weights", share, 0.95
        ),
    ]


def plot(results: Results) -> Plot:
    fronts = _fronts(results)
    groups = {name: list(front.values()) for name, front in fronts.items()}
    base = (results["base"].mean("helpful"), results["base"].mean("harmless"))
    figure = figures.scatter({**groups, "base": [base]}, x="helpful", y="harmless")
    return Plot(
        figure=figure,
        caption=(
            "Two rewards that pull apart. Mixing guides moves along the front without any "
            "training; a soup averages two DPO models; each MORL point is a PPO training."
        ),
    )


def table(results: Results) -> Table:
    fronts = _fronts(results)
    worst = worst_point(*(list(front.values()) for front in fronts.values()))
    rows = []
    for name, front in fronts.items():
        alphas = [(weight, 1 - weight) for weight in front]
        points = list(front.values())
        shown = " · ".join(f"({x:.2f}, {y:.2f})" for x, y in points)
        volume = f"{hypervolume(points, worst):.2f}"
        rows.append([name, shown, volume, f"{mip(points, alphas):.2f}"])
    return Table(
        caption=(
            "(helpful, harmless) from all weight on harmless to all on helpful. The reference of "
            f"the hypervolume is the worst of all, ({worst[0]:.2f}, {worst[1]:.2f})."
        ),
        head=("method", "points", "hypervolume", "mean inner product"),
        rows=rows,
    )
