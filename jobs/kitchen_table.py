"""What came of the kitchen's stages: every model's answers to the same new questions, judged."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
from tqdm import tqdm

from jobs.decoder import Decoder, Part
from jobs.decoding_config import DecodingConfig, DecodingJobConfig, KitchenPrompts
from jobs.pool import Chunk
from pilotfish import world
from pilotfish.evaluation.metrics import estimate
from pilotfish.evaluation.rewards import KitchenRewardConfig
from pilotfish.evaluation.settings import Setting
from pilotfish.train.export import read_record

NUM_QUESTIONS = 200
_SEED = 2001


@dataclass(frozen=True, slots=True)
class Method:
    """One way to answer."""

    name: str
    base: str = "base"
    """Stage of the model that answers."""
    guides: Mapping[str, float] = field(default_factory=dict)
    """Weight by stage."""
    temperature: float = 1.0
    trained: str | None = None
    """Stage whose own metric and cost the row shows."""


METHODS: Sequence[Method] = (
    Method("base", trained="base"),
    Method("base, T=0.7", temperature=0.7),
    Method("base, greedy", temperature=0),
    Method("larger base", base="base_m", trained="base_m"),
    Method(
        "ARGS w=24, greedy", guides={"reward_model": 24.0}, temperature=0, trained="reward_model"
    ),
    Method(
        "PARGS w=6, greedy", guides={"reward_prefix": 6.0}, temperature=0, trained="reward_prefix"
    ),
    Method("CD-FUDGE w=2, T=0.7", guides={"value": 2.0}, temperature=0.7, trained="value"),
    Method("CD-Q w=2, T=0.7", guides={"value_q": 2.0}, temperature=0.7, trained="value_q"),
    Method("GenARM w=1, T=0.7", guides={"genarm": 1.0}, temperature=0.7, trained="genarm"),
    Method(
        "GenARM helpful 0.5 + harmless 0.5, T=0.7",
        guides={"genarm_helpful": 0.5, "genarm_harmless": 0.5},
        temperature=0.7,
    ),
    Method("Proxy-RLHF, PPO", guides={"proxy": 1.0}, trained="proxy"),
    Method("Proxy-RLHF, SAC (MARA)", guides={"proxy_mara": 1.0}, trained="proxy_mara"),
    Method("Aligner", guides={"aligner": 1.0}, trained="aligner"),
    Method("Aligner on the larger base", base="base_m", guides={"aligner": 1.0}),
    Method("DPO, T=0.7", base="dpo", temperature=0.7, trained="dpo"),
    Method("PPO-RLHF, T=0.7", base="ppo", temperature=0.7, trained="ppo"),
    Method("MORL, T=0.7", base="morl", temperature=0.7, trained="morl"),
    Method("Rewarded Soup of two DPOs, T=0.7", base="soup", temperature=0.7, trained="soup"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    own_metric: str
    """What the training measured on held-out rows."""
    reward: float
    """True reward per answer."""
    error: float
    """Its standard error over questions."""
    helpful: float
    harmless: float
    bad_share: float
    length: float
    tokens_per_second: float
    forwards_per_token: float
    num_trained: int | None
    seconds: float | None
    """Of training, in this run or when it was trained."""


@dataclass(frozen=True, slots=True)
class Check:
    """Something that the table must show."""

    claim: str
    found: float
    wanted: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        mark = "ok  " if self.holds else "FAIL"
        return f"{mark}  {self.claim}: {self.found:.3f} (wanted {sign} {self.wanted})"


def measure(root: Path) -> list[Row]:
    """Answer the questions with every method, in Ray tasks, and judge the answers by the truth."""
    task: Any = ray.remote(num_cpus=1)(_answer)
    place_of = {task.remote(root, method): place for place, method in enumerate(METHODS)}
    rows: dict[int, Row] = {}
    with tqdm(total=len(METHODS), desc="measuring", unit="method", ncols=100) as bar:
        left = list(place_of)
        while left:
            [done], left = ray.wait(left)
            place = place_of[done]
            rows[place] = _row(root, METHODS[place], ray.get(done))
            bar.update()
    return [rows[place] for place in range(len(METHODS))]


def _answer(root: Path, method: Method) -> Part:
    folder = root / "kitchen"
    job = DecodingJobConfig(
        root=str(root),
        output=str(folder),
        base=str(folder / method.base),
        guides={name: str(folder / name) for name in method.guides},
        prompts=KitchenPrompts(source="kitchen"),
        reward=KitchenRewardConfig(),
        decoding=DecodingConfig(max_tokens=100, batch_size=100),
    )
    setting = Setting(name=method.name, guides=dict(method.guides), temperature=method.temperature)
    prompts: Any = [tuple(scene.messages) for scene in world.scenes(NUM_QUESTIONS, _SEED)]
    return Decoder(job, [setting]).process(Chunk(label=method.name, start=0, items=prompts))


def _row(root: Path, method: Method, part: Part) -> Row:
    rewards = estimate([answer.reward or 0.0 for answer in part.answers])
    num_tokens = sum(answer.num_tokens for answer in part.answers)
    record = None if method.trained is None else _record(root, method.trained)
    sides = {
        side: sum(answer.parts[side] for answer in part.answers) / len(part.answers)
        for side in ("helpful", "harmless")
    }
    return Row(
        name=method.name,
        own_metric="" if record is None else own_metric(record["metrics"]),
        reward=rewards.mean,
        error=rewards.error,
        bad_share=sum(answer.bad for answer in part.answers) / len(part.answers),
        length=num_tokens / len(part.answers),
        tokens_per_second=num_tokens / part.seconds,
        forwards_per_token=part.num_forwards / num_tokens,
        num_trained=None if record is None else record["metrics"].get("trainable_parameters"),
        seconds=None if record is None else training_seconds(record),
        **sides,
    )


def own_metric(metrics: Mapping[str, float]) -> str:
    """Return what a training's last report says of held-out rows, in the objective's own terms."""
    if "eval/true_reward" in metrics:
        return f"RM score {metrics['eval/reward']:.2f}, KL {metrics['eval/kl']:.1f}"
    if "eval/accuracy" in metrics:
        return f"pair accuracy {metrics['eval/accuracy']:.3f}"
    if "eval/final_squared_error" in metrics:
        spread = metrics["eval/squared_reward"] - metrics["eval/reward"] ** 2
        return f"R2 of whole answers {1 - metrics['eval/final_squared_error'] / spread:.2f}"
    if "eval/loss" in metrics:
        return f"nll per token {metrics['eval/loss']:.3f}"
    return ""


def training_seconds(record: Mapping[str, Any]) -> float:
    """Return the seconds that the steps of a training took, without its start."""
    total, before = 0.0, 0.0
    for report in record.get("history", ()):
        total += report["train/seconds_per_step"] * (report["step"] - before)
        before = report["step"]
    return total


def check_shape(root: Path, rows: Sequence[Row]) -> list[Check]:
    """Return the claims that a sound training of the kitchen must bear out."""
    reward = {row.name: row.reward for row in rows}
    last = {name: _record(root, name)["metrics"] for name in ("proxy", "genarm", "dpo")}
    last["rm"] = _record(root, "reward_model")["metrics"]
    proxy = last["proxy"]
    return [
        Check("reward model: pair accuracy", last["rm"]["eval/accuracy"], 0.74),
        Check("GenARM: pair accuracy", last["genarm"]["eval/accuracy"], 0.83),
        Check("DPO: pair accuracy", last["dpo"]["eval/accuracy"], 0.82),
        Check("GenARM above the base", reward["GenARM w=1, T=0.7"] - reward["base"], 2.0),
        Check("proxy above the base", proxy["eval/true_reward"] - proxy["base/true_reward"], 1.0),
        Check(
            "proxy above its untrained control",
            proxy["eval/true_reward"] - proxy["untrained/true_reward"],
            1.0,
        ),
        Check("proxy: share of parameters", proxy["trainable_share"], 0.01, at_most=True),
        Check("Aligner above its base", reward["Aligner"] - reward["base"], 2.5),
        Check(
            "Aligner above a base it never saw",
            reward["Aligner on the larger base"] - reward["larger base"],
            2.5,
        ),
    ]


_HEAD = (
    *("method", "held-out metric", "true reward", "helpful", "harmless", "bad", "tokens"),
    *("tokens/s", "forwards/token", "trained", "seconds"),
)


def draw_table(rows: Sequence[Row]) -> str:
    """Return the table as Markdown whose columns are aligned."""
    lines = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]

    def draw(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = [("-" * width if at < 2 else "-" * (width - 1) + ":") for at, width in enumerate(widths)]
    return "\n".join([draw(lines[0]), draw(rule), *map(draw, lines[1:])])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.own_metric,
        f"{row.reward:.2f} ± {row.error:.2f}",
        f"{row.helpful:.2f}",
        f"{row.harmless:.2f}",
        f"{row.bad_share:.1%}",
        f"{row.length:.1f}",
        f"{row.tokens_per_second:.0f}",
        f"{row.forwards_per_token:.2f}",
        "" if row.num_trained is None else f"{row.num_trained:,.0f}",
        "" if not row.seconds else f"{row.seconds:.0f}",
    )


def write_table(rows: Sequence[Row], folder: Path) -> None:
    """Write the table as Markdown and as JSON, and a picture of the rewards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(draw_table(rows) + "\n", encoding="utf-8")
    text = json.dumps([asdict(row) for row in rows], indent=2)
    (folder / "table.json").write_text(text + "\n", encoding="utf-8")
    _draw_rewards(rows).savefig(folder / "rewards.png", dpi=150)


def _draw_rewards(rows: Sequence[Row]) -> Any:
    """Return a figure with a bar per method, in the order of the table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.36 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [row.name for row in rows]
    colours = ["#9aa5b1" if name.startswith(("base", "larger")) else "#2f6f9f" for name in names]
    places = range(len(rows))
    axes.barh(
        places,
        [row.reward for row in rows],
        xerr=[1.96 * row.error for row in rows],
        color=colours,
        error_kw={"ecolor": "#333333", "lw": 1},
    )
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.axvline(0, color="#333333", lw=0.8)
    axes.set_xlabel(f"true reward per answer, {NUM_QUESTIONS} new questions (95% interval)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    return figure


def _record(root: Path, stage: str) -> dict[str, Any]:
    """Return a stage's training record; a soup was not trained, and has no metrics of its own."""
    return {"metrics": {}, **(read_record(root / "kitchen" / stage) or {})}
