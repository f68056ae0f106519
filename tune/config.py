"""What a search is told: a space of knobs, how to walk through it, and what counts as good."""

import difflib
import re
from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_serializer
from pydantic import model_validator as validates

from jobs.decoding_config import DecodingJobConfig, PromptsConfig, check_guide_names, with_paths
from jobs.output import OutputConfig
from jobs.paths import located
from pilotfish.config import Config
from pilotfish.errors import ConfigError
from pilotfish.evaluation.rewards import KitchenRewardConfig, NoRewardConfig
from pilotfish.evaluation.settings import Setting
from tune.space import Distribution

_COST = ("tokens_per_second", "forwards_per_token")
_TEXT = ("distinct_1", "distinct_2", "distinct_3", "unique")
DECODING_METRICS = ("kl", "kl_per_token", "length", "bad_share", *_TEXT, *_COST)
"""What every decoding is measured by; a judge adds `reward` and the parts that it is made of."""

_CONSTRAINT = re.compile(r"(\S+)\s*(<=|>=)\s*(?:([-+.\w]+)\s*\*\s*)?([-+.\w]+)")


class Objective(Config):
    """A metric to make as large, or as small, as possible."""

    metric: str
    mode: Literal["max", "min"] = "max"


class Constraint(Config):
    """A bound on a metric: `kl <= 6`, or in terms of the base, `tokens_per_second >= 0.5 * base`.

    `base` is the metric of the base alone on the same prompts.
    """

    metric: str
    at_most: bool
    bound: float
    of_base: bool = False
    """Whether the bound is a multiple of what the base has."""

    @validates(mode="before")
    @classmethod
    def _read(cls, written: Any) -> Any:
        if not isinstance(written, str):
            return written
        match = _CONSTRAINT.fullmatch(written.strip())
        if match is None:
            raise ValueError(_NOT_A_CONSTRAINT)
        metric, sign, factor, last = match.groups()
        of_base = last == "base"
        if factor is not None and not of_base:
            raise ValueError(_NOT_A_CONSTRAINT)
        try:
            bound = float(factor or 1) if of_base else float(last)
        except ValueError:
            raise ValueError(_NOT_A_CONSTRAINT) from None
        return {"metric": metric, "at_most": sign == "<=", "bound": bound, "of_base": of_base}

    def __str__(self) -> str:
        bound = f"{self.bound:g}" + (" * base" if self.of_base else "")
        return f"{self.metric} {'<=' if self.at_most else '>='} {bound}"

    @model_serializer
    def _write(self) -> str:
        return str(self)


_NOT_A_CONSTRAINT = (
    "wanted METRIC <= NUMBER or METRIC >= NUMBER, where the number may be a multiple of what the "
    "base has: kl <= 6, tokens_per_second >= 0.5 * base"
)


class NoScheduler(Config):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


class ASHA(Config):
    """Stops trials that are not among the best at their rung.

    Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020.
    """

    kind: Literal["asha"]
    reduction_factor: float = Field(default=2.0, gt=1)
    """One in so many goes on."""
    grace_period: PositiveInt | None = None
    """No trial is stopped before so many prompts, or steps of a training. Default: the first report
    of a search over decode-time knobs, a reduction less than all steps of a training."""


class PBT(Config):
    """Trainings that copy better ones, weights and all, and go on with changed knobs.

    Jaderberg et al., "Population Based Training of Neural Networks", 2017.
    """

    kind: Literal["pbt"]
    perturbation_interval: PositiveInt
    """Steps between looks at the others."""
    quantile_fraction: float = Field(default=0.25, gt=0, le=0.5)
    """Share at the bottom that copies, and at the top that is copied."""
    resample_probability: float = Field(default=0.25, ge=0, le=1)
    """How often a knob is drawn anew rather than moved by a fifth."""


class SearchPlan(Config):
    """How the space is walked through."""

    algorithm: Literal["random", "optuna", "optuna_nsga2"] = "random"
    """`optuna` is a tree-structured Parzen estimator; `optuna_nsga2` is for several objectives."""
    num_samples: PositiveInt = 1
    """Draws beside the `points`; each draw tries every point of a grid."""
    points: tuple[dict[str, Any], ...] = ()
    """Knobs to try first, each a value for every key of the space."""
    scheduler: Annotated[NoScheduler | ASHA | PBT, Field(discriminator="kind")] = NoScheduler()
    max_concurrent_trials: PositiveInt = 1
    """1: the search walks the same path whenever it is run. More gives that up, since which trial
    ends first then decides what is tried next."""
    repeats: PositiveInt = 1
    """Seeds per point; the same ones for all points."""


class SearchConfig(OutputConfig):
    """What both kinds of search are told; `output` is the folder of what comes of it."""

    title: str = "Search"
    seed: NonNegativeInt = 1
    space: dict[str, Distribution] = Field(min_length=1)
    """By dotted key of what is searched."""
    search: SearchPlan = SearchPlan()
    objectives: tuple[Objective, ...] = Field(min_length=1)
    """The first decides which point is best; all of them make the Pareto set."""
    constraints: tuple[Constraint, ...] = ()
    """Points that break one are never best."""

    @validates(mode="after")
    def _check_search(self) -> Self:
        plan, several = self.search, len(self.objectives) > 1
        grids = [key for key, values in self.space.items() if values.grid_search]
        if grids and plan.algorithm != "random":
            raise ValueError(
                f"{grids[0]} is a grid, which {plan.algorithm} cannot draw from: write choice, or "
                "search.algorithm=random"
            )
        if plan.algorithm == "optuna_nsga2" and not several:
            raise ValueError("optuna_nsga2 is for several objectives: for one, write optuna")
        if several and plan.scheduler.kind != "none":
            raise ValueError(f"{plan.scheduler.kind} compares trials by one objective, got several")
        for number, point in enumerate(plan.points):
            _check_point(f"search.points.{number}", point, self.space)
        return self


class DecodingSearchConfig(SearchConfig, DecodingJobConfig):
    """A search over decode-time knobs: nothing is trained, and all trials share one base.

    Keys of the space are `temperature`, `top_p`, `top_k`, `guides.NAME` (a weight), and
    `args.NAME.FIELD` (a setting of a guide that can change while it is loaded).
    """

    setting: Setting = Setting(name="default")
    """What the knobs change; as it stands it is what the winner has to beat."""
    rungs: tuple[PositiveInt, ...] = ()
    """A trial reports after so many prompts, and after all of them."""
    confirm: PromptsConfig
    """Other prompts, on which the winner is held against the setting as it stands."""

    @validates(mode="after")
    def _check_decoding(self) -> Self:
        check_guide_names([self.setting], self.guides)
        if self.search.scheduler.kind == "pbt":
            raise ValueError("pbt copies weights, and a search over decode-time knobs has none")
        if list(self.rungs) != sorted(set(self.rungs)) or 1 in self.rungs:
            raise ValueError(f"rungs: wanted growing numbers from 2, got {list(self.rungs)}")
        for key in self.space:
            _check_knob(key, self.setting)
        check_metrics(self, self.metric_names)
        return self

    @property
    def metric_names(self) -> tuple[str, ...]:
        if isinstance(self.reward, NoRewardConfig):
            return DECODING_METRICS
        parts = ("helpful", "harmless") if isinstance(self.reward, KitchenRewardConfig) else ()
        return ("reward", *parts, *DECODING_METRICS)


class Retraining(Config):
    """The best knobs and the job as it is, trained anew to see whether the one beats the other."""

    seeds: int = Field(default=3, ge=2)
    """Trainings of each, with seeds that no trial had."""
    overrides: tuple[str, ...] = Field(min_length=1)
    """Dotted overrides that give the job other held-out rows: `data.heldout_seed=79`."""


class TrainingSearchConfig(SearchConfig):
    """A search over training knobs: every trial trains a job.

    Keys of the space are dotted keys of the job's config, and metrics are those of its reports.
    """

    job: str
    """Path of the config of `python -m jobs.train`."""
    overrides: tuple[str, ...] = ()
    """Dotted overrides of it that hold for all trials."""
    confirm: Retraining | None = None


def resolved_decoding(config: DecodingSearchConfig) -> DecodingSearchConfig:
    """Return the config with absolute paths everywhere. Raises `ConfigError`."""
    return with_paths(config).model_copy(update={"confirm": located(config.confirm)})


def check_metrics(config: SearchConfig, known: Collection[str]) -> None:
    """Raise `ConfigError` for an objective or a constraint on a metric that is not known."""
    for one in (*config.objectives, *config.constraints):
        _check_known(one.metric, known, "metric")


def _check_point(where: str, point: dict[str, Any], space: dict[str, Distribution]) -> None:
    if set(point) != set(space):
        raise ValueError(f"{where}: wanted a value for each of {', '.join(space)}")
    for key, value in point.items():
        if value not in space[key]:
            raise ValueError(f"{where}: {key} is {value!r}, which is not in {space[key]}")


def _check_knob(key: str, setting: Setting) -> None:
    part, _, rest = key.partition(".")
    if part == "args" and "." in rest:
        part, rest = "guides", rest.rpartition(".")[0]
    if part == "guides" and rest:
        _check_known(f"guides.{rest}", [f"guides.{name}" for name in setting.guides], "guide")
        return
    known = ["temperature", "top_p", "top_k", "guides.NAME", "args.NAME.FIELD"]
    _check_known(key, known[:3], "knob", shown=known)


def _check_known(
    name: str, known: Collection[str], what: str, *, shown: Collection[str] = ()
) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        every = ", ".join(shown or known)
        hint = f"did you mean {close[0]!r}?" if close else f"wanted one of {every}"
        raise ConfigError(f"no {what} is called {name!r}; {hint}")
