"""The same requests to an engine in this process, or to a server: so many streams at a time.

Runs in a process of its own, as a server and its clients do. Reads one JSON object per line from
stdin (`Load`, and where it goes), and answers each with what came of it (`Found`).
"""

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import aiohttp
import torch

from benchmarks.machine import stdout_for_report
from pilotfish import Pilot, SamplingParams, world
from pilotfish.chat import render_prompt
from pilotfish.context import Prompt
from pilotfish.decode.sequence import Request


@dataclass(frozen=True)
class Load:
    """What is asked for."""

    num_streams: int
    num_requests: int
    num_tokens: int
    """Per request, on average; they differ, so that streams do not end all at once."""
    seed: int

    def length(self, number: int) -> int:
        """Return the tokens of a request: from half the average to half more, evenly."""
        return self.num_tokens // 2 + (number * 37) % (self.num_tokens + 1)


@dataclass(frozen=True)
class Found:
    """When tokens came; seconds."""

    tokens_per_second: float
    first: list[float]
    """From sending a request to its first token, per request."""
    gaps: list[float]
    """Between two arrivals within a request."""
    num_tokens: int
    num_refused: int = 0
    """Answers of 429; their clients wait as they are told, and ask again."""


class Clock:
    """When the tokens of each request arrived."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._last: dict[int, float] = {}
        self._sent: dict[int, float] = {}
        self._first: list[float] = []
        self._gaps: list[float] = []
        self._num_tokens = 0
        self.num_refused = 0

    def send(self, key: int) -> None:
        self._sent[key] = time.perf_counter()

    def arrive(self, key: int, num_tokens: int) -> None:
        now = time.perf_counter()
        if key in self._last:
            self._gaps.append(now - self._last[key])
        else:
            self._first.append(now - self._sent[key])
        self._last[key] = now
        self._num_tokens += num_tokens

    def found(self) -> Found:
        seconds = max(self._last.values()) - self._started
        rate = self._num_tokens / seconds
        return Found(rate, self._first, self._gaps, self._num_tokens, self.num_refused)


class InProcess:
    """An engine, stepped for as long as there are requests."""

    def __init__(self, base: str, guide: str) -> None:
        torch.set_num_threads(1)
        self._pilot = Pilot(base, {"helpful": guide}, device="cpu", num_slots=32)
        self._keys = iter(range(10**9))

    def run(self, load: Load) -> Found:
        engine, clock = self._pilot.engine, Clock()
        waiting = deque(self._requests(load))
        num_open = 0
        while waiting or num_open:
            while waiting and num_open < load.num_streams:
                request = waiting.popleft()
                clock.send(request.key)
                engine.submit(request)
                num_open += 1
            for event in engine.step():
                clock.arrive(event.key, 1)
                num_open -= event.finish_reason is not None
        return clock.found()

    def _requests(self, load: Load) -> Iterator[Request]:
        for number, text in enumerate(_questions(load)):
            ids = render_prompt(self._pilot.tokenizer, [{"role": "user", "content": text}])
            params = SamplingParams(
                max_tokens=load.length(number), seed=load.seed + number, ignore_eos=True
            )
            key = next(self._keys)
            yield Request(key=key, prompt=Prompt(ids), params=params, guides={"helpful": 1.0})


class OverHTTP:
    """Streams of an OpenAI-compatible server, read as they come and not parsed further."""

    def __init__(self, url: str) -> None:
        self._url = url

    def run(self, load: Load) -> Found:
        return asyncio.run(self._run(load))

    async def _run(self, load: Load) -> Found:
        bodies = deque(enumerate(_questions(load)))
        connector = aiohttp.TCPConnector(limit=load.num_streams)
        async with aiohttp.ClientSession(connector=connector) as session:
            clock = Clock()

            async def client() -> None:
                while bodies:
                    number, text = bodies.popleft()
                    await self._ask(session, clock, number, text, load)

            await asyncio.gather(*(client() for _ in range(load.num_streams)))
        return clock.found()

    async def _ask(
        self, session: aiohttp.ClientSession, clock: Clock, key: int, text: str, load: Load
    ) -> None:
        body = {
            "model": "base:helpful",
            "guides": [{"name": "helpful", "weight": 1.0}],
            "messages": [{"role": "user", "content": text}],
            "max_tokens": load.length(key),
            "seed": load.seed + key,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        clock.send(key)
        while (wait_s := await self._answer(session, clock, key, body)) is not None:
            clock.num_refused += 1
            await asyncio.sleep(wait_s)

    async def _answer(
        self, session: aiohttp.ClientSession, clock: Clock, key: int, body: dict[str, Any]
    ) -> float | None:
        """Read a stream to its end, or return how long to wait before asking again."""
        async with session.post(f"{self._url}/v1/chat/completions", json=body) as response:
            if response.status == 429:
                return float(response.headers["Retry-After"])
            response.raise_for_status()
            async for line in response.content:
                ids = line.find(b'"token_ids":[')
                if ids < 0:
                    continue
                numbers = line[ids : line.index(b"]", ids)]
                if not numbers.endswith(b"["):
                    clock.arrive(key, 1 + numbers.count(b","))
        return None


def _questions(load: Load) -> list[str]:
    return [scene.text for scene in world.scenes(load.num_requests, load.seed)]


def main(asked: TextIO, answers: TextIO) -> None:
    settings: dict[str, Any] = json.loads(asked.readline())
    loop = OverHTTP(**settings) if "url" in settings else InProcess(**settings)
    for line in asked:
        answers.write(json.dumps(asdict(loop.run(Load(**json.loads(line))))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.stdin, stdout_for_report())
