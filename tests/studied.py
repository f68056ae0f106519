"""A study that was never run: made-up answers of every method, as sound methods would give them."""

import json
import zlib
from pathlib import Path

import numpy as np

from jobs.reproduce.measured import Measured, Results
from jobs.reproduce.methods import folder_of
from jobs.reproduce.study import METHODS, NUM_DRAFTS
from jobs.reproduce.trainings import ROUNDS
from pilotfish.evaluation.metrics import compare
from pilotfish.train.export import write_record

# Mean reward by the beginning of a method's name; the longest that fits counts.
_WORTH = {
    **{"": 0.0, "base": -0.3, "genarm": 4.2, "genarm_w0.25": 1.0, "dpo": 4.0, "ppo": 3.4},
    **{"proxy": 3.4, "proxy_untrained": -0.5, "proxy_literal": -4.0, "proxy_24": 2.0},
    **{"unseen_base": -0.4, "unseen_proxy": 3.0, "best": 2.5},
    **{"args": -0.2, "args_w6": 0.4, "transfer": 2.8, "transfer_naive": 1.0, "cd": 2.0},
    **{"weak": 2.6, "weak_base_m": 3.0, "aligner": 4.4, "aligned": 4.5, "aligner_50": 4.0},
    **{"mix": 3.5, "only": 3.5, "soup": 3.0, "morl": 3.0, "rounds": 3.5, "pargs": 3.7},
}
# What answers word by word like another one.
_ALIKE = {
    "proxy_off": "base_greedy",
    "proxy_off_iid": "base_t1",
    "mix_100": "only_helpful",
    "mix_0": "only_harmless",
    "aligner_copyist": "base",
}


def made_up(name: str, num: int = 40) -> Measured:
    """Return made-up answers of a method, the same whenever they are asked for."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    worth = _WORTH[max((one for one in _WORTH if name.startswith(one)), key=len)]
    count = num * METHODS[name].copies if name in METHODS else num
    rewards = worth + 0.5 * rng.normal(size=count)
    tilt = {"mix_0": -1.0, "mix_25": -0.5, "mix_75": 0.5, "mix_100": 1.0}.get(name, 0.0)
    tokens = rng.integers(30, 60, size=count).tolist()
    forwards = {"args": 11, "transfer": 200}.get(name.split("_")[0], 2)
    return Measured(
        texts=[f"{_ALIKE.get(name, name)} {number}" for number in range(count)],
        tokens=tokens,
        kl=(np.abs(worth) + 0.1 * rng.random(count)).tolist(),
        rewards=rewards.tolist(),
        helpful=(rewards / 2 + tilt).tolist(),
        harmless=(rewards / 2 - tilt).tolist(),
        bad=[name == "proxy_literal"] * count,
        scores=(rewards / 2 + 0.1).tolist(),
        seconds=100.0 if name.startswith("transfer") else 1.0,
        num_forwards=forwards * sum(tokens),
        notes={"expected_rejects": 0.5, "gate_open": 0.25},
    )


def made_up_results(**changed: Measured) -> Results:
    assert made_up("drafts", 2).rewards.__len__() == 2 * NUM_DRAFTS
    return Results({**{name: made_up(name) for name in METHODS}, **changed})


def write_records(root: Path) -> None:
    """Write what trainings and rounds would have recorded."""
    for stage, num in {"base": 343776, "proxy": 2954, "dpo": 343776, "ppo": 687648}.items():
        folder = folder_of(root, stage)
        folder.mkdir(parents=True)
        write_record(folder, {"config_hash": stage, "metrics": {"trainable_parameters": num}})
    _write_search(root / "reproduce" / "search_proxy")
    for name in ROUNDS:
        folder = folder_of(root, name)
        folder.mkdir(parents=True)
        rounds = [
            {
                "metrics": {
                    "monitor/reward": worth,
                    "monitor/reward_error": 0.1,
                    "monitor/bad_share": 0.0,
                }
            }
            for worth in (-0.3, 2.0, 3.0)
        ]
        write_record(folder, json.loads(json.dumps({"rounds": rounds})))


def _write_search(folder: Path) -> None:
    """Write what a search over the proxy's knobs would have left."""
    folder.mkdir(parents=True)
    trials = [
        {
            "knobs": {"args.proxy.p_t": p_t, "temperature": temperature},
            "metrics": {"reward": 3.0 - abs(p_t - 0.1), "bad_share": 0.0},
        }
        for p_t in (0.05, 0.1, 0.2)
        for temperature in (0.7, 1.0)
    ]
    comparison = compare(made_up("proxy").rewards, made_up("base").rewards)
    gains = {"reward": {"comparison": comparison.model_dump()}}
    winner = {"knobs": trials[2]["knobs"], "confirmation": {"gains": gains}}
    for name, content in (("results", {"trials": trials}), ("winner", winner)):
        (folder / f"{name}.json").write_text(json.dumps(content))
