"""A server under load whose processes are killed all the time: nothing lost, memory flat.

    python -m benchmarks.soak [--json] [--root runs] [--minutes 20] [--every 10]

Serves `kitchen/base` under `kitchen/genarm` from two base and two guide replicas behind two
ingresses, keeps so many streams open, and every so many seconds sends SIGKILL to one of them, of
the kind that has waited longest: always the youngest, so that the other one lives through it all,
and its memory tells. Every answer is compared, token by token, with what an engine in this process
draws. Where a text departs from it, the number that decided says whether that was a near-tie, which
another batch may settle otherwise.
"""

import argparse
import asyncio
import itertools
import json
import logging
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
from tqdm import tqdm

from benchmarks.machine import describe, stdout_for_report
from jobs import cluster
from jobs.serving import application, free_port, served, write_serve_config
from pilotfish import Pilot, SamplingParams, world
from pilotfish.chat import render_prompt
from pilotfish.context import Context, Prompt
from pilotfish.noise import Purpose, request_key, uniforms

logger = logging.getLogger(__name__)

APART = "BaseModel, apart"
VICTIMS = {
    "BaseModel": "ServeReplica:soak:BaseModel",
    "Guide:helpful": "ServeReplica:soak:Guide:helpful",
    APART: "serve.replicas.apart",
    "Pipeline": "ServeReplica:soak:Pipeline",
}
"""What is killed: a part of the command line, by what it is called here."""
WITNESSES = {
    "Guides": "ServeReplica:soak:Guides",
    "HTTP proxy": "ProxyActor",
    "Serve controller": "ServeController",
}
"""What is not killed."""
NEAR_TIE = 1e-3
"""In probability, between the number that decided a draw and the nearest border of a token."""


@dataclass
class Tally:
    """What came of all requests."""

    num_done: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    num_resumed: int = 0
    """Answers that a client took up again, since its connection was cut."""
    num_lost: int = 0
    """Answers with a token missing, repeated or out of place."""
    departures: list[float] = field(default_factory=list)
    """Of texts that differ from the engine's: how near a tie the first other token was."""


class Client:
    """Asks one question after the other, and takes up answers that break off."""

    one_at_a_time = asyncio.Lock()
    """The engine that judges is one."""

    def __init__(self, url: str, pilot: Pilot, tally: Tally, tokens: int) -> None:
        self._url, self._pilot, self._tally, self._tokens = url, pilot, tally, tokens

    async def run(self, numbers: "itertools.count[int]", until: float) -> None:
        async with openai.AsyncOpenAI(base_url=self._url, api_key="none", max_retries=0) as api:
            while time.monotonic() < until:
                await self._ask(api, next(numbers))

    async def _ask(self, api: openai.AsyncOpenAI, number: int) -> None:
        [scene] = world.scenes(1, seed=number)
        messages: Any = scene.messages
        ids: list[int] = []
        finished, attempts = False, 0
        while not finished:
            extra = {
                "guides": [{"name": "helpful", "weight": 1.0}],
                "return_token_ids": True,
                "ignore_eos": True,
                **({"completed_token_ids": ids} if ids else {}),
            }
            try:
                stream = await api.chat.completions.create(
                    model="base",
                    messages=messages,
                    seed=number,
                    max_tokens=self._tokens,
                    stream=True,
                    extra_body=extra,
                )
                async for chunk in stream:
                    for choice in chunk.choices:
                        ids = ids + ((choice.model_extra or {}).get("token_ids") or [])
                        finished = finished or choice.finish_reason is not None
            except openai.APIError as error:
                logger.info("answer %d broke off: %r", number, error)
            if not finished:
                attempts += 1
                if attempts > 20:
                    self._tally.num_failed += 1
                    return
                await asyncio.sleep(0.1 * attempts)
        self._tally.num_resumed += attempts > 0
        async with self.one_at_a_time:
            await asyncio.to_thread(self._judge, number, messages, ids)

    def _judge(self, number: int, messages: Any, ids: list[int]) -> None:
        tally = self._tally
        tally.num_done += 1
        tally.num_tokens += len(ids)
        tally.num_lost += len(ids) != self._tokens
        params = SamplingParams(seed=number, max_tokens=self._tokens, ignore_eos=True)
        [own] = self._pilot.generate([messages], params, guides={"helpful": 1.0})
        if own.token_ids == ids:
            return
        place = next(i for i, (a, b) in enumerate(zip(own.token_ids, ids, strict=False)) if a != b)
        tally.departures.append(self._nearness(number, messages, own.token_ids, place))

    def _nearness(self, number: int, messages: Any, ids: list[int], place: int) -> float:
        """Return how close the number that decided a draw was to a border of its token."""
        prompt = render_prompt(self._pilot.tokenizer, messages)
        context = Context(-1, Prompt(prompt), [*prompt, *ids[:place]])
        law_V = self._pilot.engine.law([context], {"helpful": 1.0})[0].double().exp()
        key = np.array([request_key(number, prompt)], dtype=np.uint64)
        [drawn] = uniforms(key, np.array([place], dtype=np.uint64), Purpose.SAMPLE)
        borders = (law_V / law_V.sum()).cumsum(0)
        return float((borders - drawn).abs().min())


async def soak(url: str, pilot: Pilot, options: argparse.Namespace) -> dict[str, Any]:
    """Load, kill and watch; return the report."""
    tally, until = Tally(), time.monotonic() + 60 * options.minutes
    numbers = itertools.count(10**6)
    clients = [Client(url, pilot, tally, options.tokens) for _ in range(options.streams)]
    watch = asyncio.create_task(_hurt_and_watch(tally, until, options))
    await asyncio.gather(*(client.run(numbers, until) for client in clients))
    kills, memory = await watch
    return {
        "minutes": options.minutes,
        "streams": options.streams,
        "kills": dict(kills),
        "answers": tally.num_done,
        "tokens": tally.num_tokens,
        "failed": tally.num_failed,
        "lost_or_repeated": tally.num_lost,
        "taken_up_by_clients": tally.num_resumed,
        "departed": len(tally.departures),
        "departed_beyond_near_ties": sum(gap > NEAR_TIE for gap in tally.departures),
        "memory_mib": memory,
    }


async def _hurt_and_watch(
    tally: Tally, until: float, options: argparse.Namespace
) -> tuple[Counter[str], dict[str, dict[str, float]]]:
    kills = Counter[str]()
    seen: dict[str, list[float]] = {}
    queue = list(VICTIMS)
    with tqdm(total=round(60 * options.minutes), unit="s", ncols=100) as bar:
        while (now := time.monotonic()) < until - options.every:
            await asyncio.sleep(options.every)
            bar.update(round(time.monotonic() - now))
            bar.set_postfix_str(f"{tally.num_done} answers, {sum(kills.values())} kills")
            for kind, mib in _memory().items():
                seen.setdefault(kind, []).append(mib)
            if (name := _kill_one(queue)) is not None:
                kills[name] += 1
    return kills, {
        kind: {
            "first_quarter": statistics.median(values[: max(1, len(values) // 4)]),
            "last_quarter": statistics.median(values[-max(1, len(values) // 4) :]),
            "most": max(values),
        }
        for kind, values in seen.items()
    }


def _kill_one(queue: list[str]) -> str | None:
    """Kill the youngest of the first kind of which there are two, and put the kind last."""
    for name in queue:
        alive = _victims(name)
        if len(alive) > 1:  # the last one is left to those who wait for it
            os.kill(alive[-1].pid, signal.SIGKILL)
            queue.remove(name)
            queue.append(name)
            return name
    return None


def _victims(name: str) -> list[psutil.Process]:
    """Return the processes of a kind that may be killed, from the oldest one."""
    if name == "BaseModel":  # not those that still load: what is apart would never have its turn
        return [one for apart in _processes(VICTIMS[APART]) if (one := apart.parent()) is not None]
    return _processes(VICTIMS[name])


def _processes(title: str) -> list[psutil.Process]:
    """Return the processes of a kind, from the oldest one."""
    found = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        if title in " ".join(process.info["cmdline"] or ()):
            found.append(process)
    return sorted(found, key=lambda process: process.info["create_time"])


def _memory() -> dict[str, float]:
    """Return the resident MiB of the oldest process of each kind."""
    memory = {}
    for kind, title in {**VICTIMS, **WITNESSES}.items():
        with suppress(IndexError, psutil.NoSuchProcess):
            memory[kind] = _processes(title)[0].memory_info().rss / 2**20
    return memory


def write_config(path: Path, *, root: Path, port: int) -> None:
    """Write a Serve config with two replicas of everything that is killed."""
    guide = {"name": "helpful", "path": str(root / "kitchen" / "genarm"), "placement": "remote"}
    args = {
        "base": {"path": str(root / "kitchen/base"), "num_replicas": 2, "num_cpus": 0.1},
        "guides": [{**guide, "num_replicas": 2, "num_cpus": 0.1, "precision": "full"}],
        "ingress": {"num_replicas": 2, "num_cpus": 0.1},
    }
    write_serve_config(path, [application("soak", args, OMP_NUM_THREADS="1")], port=port)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object on a line")
    parser.add_argument("--root", default="runs", help="holds kitchen/base, kitchen/genarm")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=10, help="seconds between kills")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100, help="per answer")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    out = stdout_for_report()
    root, port = Path(options.root).resolve(), free_port(8000)
    cluster.connect(num_cpus=4)
    kitchen = root / "kitchen"
    pilot = Pilot(kitchen / "base", {"helpful": kitchen / "genarm"}, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "serve.yaml")
        write_config(config, root=root, port=port)
        with served(config, port=port):
            report = asyncio.run(soak(f"http://127.0.0.1:{port}/v1", pilot, options))
    out.write(json.dumps({**describe(1), **report}, indent=None if options.json else 2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
