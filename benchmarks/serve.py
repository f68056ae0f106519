"""The server beside the engine that is inside it: tokens per second and latencies over HTTP.

    python -m benchmarks.serve [--json] [--root runs]

Serves `kitchen/base` under `kitchen/genarm` on a local Ray cluster, first with the guide in the
base's process and then in a replica of its own, and asks the same questions of each and of an
engine in a process of its own, in turns within each round; ratios are medians over rounds. Clients,
the HTTP proxy, the ingress and the models share this machine's cores, as they would not elsewhere.

A third application has few places; it is asked by as many clients as it admits, and by four times
as many, who come back when they are told to: what it gets done must not suffer.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import describe, stdout_for_report
from benchmarks.serve_load import Found, Load
from jobs import cluster
from jobs.serving import (
    application,
    free_port,
    haproxy_environment,
    served,
    write_serve_config,
)

ROOT = Path(__file__).resolve().parents[1]
PLACEMENTS = ("colocated", "remote")
NARROW = "narrow"
NUM_PLACES = 8
"""Of the narrow application; as many requests wait."""


@dataclass(frozen=True)
class Side:
    """Medians over rounds of one way to ask; milliseconds."""

    tokens_per_second: float
    first_token_ms: float
    gap_p50_ms: float
    gap_p99_ms: float
    tokens_per_arrival: float


@dataclass(frozen=True)
class Row:
    """One placement of the guide at one number of streams."""

    placement: str
    num_streams: int
    http: Side
    in_process: Side
    ratio: float
    """Tokens per second over HTTP, by those of the engine."""
    ratios: tuple[float, float]
    """The least and the greatest of all rounds."""
    first_token_overhead_ms: float


@dataclass(frozen=True)
class Overload:
    """The narrow application, by tokens per second."""

    at_capacity: float
    at_four_times: float
    ratio: float
    num_refused: int
    """Answers of 429 in a round, the median."""


class Asker:
    """A process that makes requests when it is told to."""

    def __init__(self, **settings: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serve_load"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._send(settings)

    def run(self, load: Load) -> Found:
        self._send(asdict(load))
        assert self._process.stdout is not None
        return Found(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()


def measure(name: str, options: argparse.Namespace, asker: Asker, engine: Asker) -> list[Row]:
    """Ask an application and the engine the same in every round."""
    rows = []
    with tqdm(total=len(options.streams) * (options.rounds + 1), unit="round", desc=name) as bar:
        for num_streams in options.streams:
            over_http: list[Found] = []
            inside: list[Found] = []
            for number in range(options.rounds + 1):
                load = Load(
                    num_streams=num_streams,
                    num_requests=max(options.requests, 4 * num_streams),
                    num_tokens=options.tokens,
                    seed=100 * number,
                )
                for one, found in ((engine, inside), (asker, over_http)):
                    answer = one.run(load)
                    if number:  # the first round warms up
                        found.append(answer)
                bar.update()
            rows.append(_row(name, num_streams, over_http, inside))
    return rows


def overload(asker: Asker, options: argparse.Namespace) -> Overload:
    """Ask what the narrow application admits, and four times that, in turns."""
    capacity = 2 * NUM_PLACES

    def found(factor: int, number: int) -> Found:
        load = Load(
            num_streams=factor * capacity,
            num_requests=12 * capacity,
            num_tokens=options.tokens,
            seed=100 * number,
        )
        return asker.run(load)

    found(1, 0)  # warms up
    rounds = [(found(1, number), found(4, number)) for number in range(1, options.rounds + 1)]
    return Overload(
        at_capacity=statistics.median(one.tokens_per_second for one, _ in rounds),
        at_four_times=statistics.median(four.tokens_per_second for _, four in rounds),
        ratio=statistics.median(
            four.tokens_per_second / one.tokens_per_second for one, four in rounds
        ),
        num_refused=round(statistics.median(four.num_refused for _, four in rounds)),
    )


def _row(
    placement: str, num_streams: int, over_http: Sequence[Found], inside: Sequence[Found]
) -> Row:
    ratios = [
        one.tokens_per_second / other.tokens_per_second
        for one, other in zip(over_http, inside, strict=True)
    ]
    http, in_process = _side(over_http), _side(inside)
    return Row(
        placement=placement,
        num_streams=num_streams,
        http=http,
        in_process=in_process,
        ratio=statistics.median(ratios),
        ratios=(min(ratios), max(ratios)),
        first_token_overhead_ms=http.first_token_ms - in_process.first_token_ms,
    )


def _side(rounds: Sequence[Found]) -> Side:
    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    def percentile(one: Found, share: float) -> float:
        return sorted(one.gaps)[int(share * (len(one.gaps) - 1))]

    return Side(
        tokens_per_second=median([one.tokens_per_second for one in rounds]),
        first_token_ms=1e3 * median([median(one.first) for one in rounds]),
        gap_p50_ms=1e3 * median([percentile(one, 0.5) for one in rounds]),
        gap_p99_ms=1e3 * median([percentile(one, 0.99) for one in rounds]),
        tokens_per_arrival=median(
            [one.num_tokens / (len(one.gaps) + len(one.first)) for one in rounds]
        ),
    )


@contextmanager
def asking(name: str, *, root: Path, port: int) -> Iterator[Asker]:
    """Serve one application, alone on the machine, and ask it."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "serve.yaml")
        write_config(config, name, root=root, port=port)
        with served(config, port=port):
            asker = Asker(url=f"http://127.0.0.1:{port}")
            try:
                yield asker
            finally:
                asker.close()


def write_config(path: Path, name: str, *, root: Path, port: int) -> None:
    """Write a Serve config for a placement of the guide, or for the narrow application."""
    guide = {"name": "helpful", "path": str(root / "kitchen" / "genarm")}
    process = {"placement": "remote", "num_cpus": 0.1} if name == "remote" else {}
    few = {"max_in_flight": NUM_PLACES, "max_queued": NUM_PLACES} if name == NARROW else {}
    args = {
        "base": {"path": str(root / "kitchen" / "base"), "num_cpus": 0.1},
        "guides": [{**guide, **process}],
        "ingress": {"num_cpus": 0.1, **few},
    }
    one = application(name, args, OMP_NUM_THREADS="1")
    write_serve_config(path, [one], port=port, proxy_location="HeadOnly")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object on a line")
    parser.add_argument("--root", default="runs", help="holds kitchen/base, kitchen/genarm")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=12, help="at least, per round")
    parser.add_argument("--tokens", type=int, default=100, help="per request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--proxy", choices=("haproxy", "serve"), default="haproxy")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    out = stdout_for_report()
    if options.proxy == "haproxy":
        os.environ.update(haproxy_environment())
    root, port = Path(options.root).resolve(), free_port(8000)
    cluster.connect(num_cpus=4)
    kitchen = root / "kitchen"
    engine = Asker(base=str(kitchen / "base"), guide=str(kitchen / "genarm"))
    rows: list[Row] = []
    try:
        for name in PLACEMENTS:
            with asking(name, root=root, port=port) as asker:
                rows += measure(name, options, asker, engine)
        with asking(NARROW, root=root, port=port) as asker:
            crowded = overload(asker, options)
    finally:
        engine.close()
    report = {
        **describe(1),
        "proxy": options.proxy,
        "load_average": os.getloadavg()[2],
        "rows": [asdict(row) for row in rows],
        "overload": asdict(crowded),
    }
    out.write(json.dumps(report, indent=None if options.json else 2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
