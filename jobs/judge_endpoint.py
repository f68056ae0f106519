"""Ask an OpenAI-compatible endpoint many questions, and keep every reply as it comes."""

import asyncio
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAIError
from openai.types.chat import ChatCompletion
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from tqdm import tqdm

from jobs.progress import are_hidden, refresh_seconds
from pilotfish.config import Config
from pilotfish.errors import ConfigError, PilotfishError


class EndpointConfig(Config):
    """Where the judge is, and how it is asked."""

    model: str
    base_url: str | None = None
    """Default: OPENAI_BASE_URL, else OpenAI's own."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; null for an endpoint that asks for none."""
    request: dict[str, Any] = Field(default_factory=lambda: {"temperature": 0, "max_tokens": 512})
    """Fields of every request beside model and messages, as this model takes them."""
    max_concurrent: PositiveInt = 8
    """Requests at a time."""
    max_retries: NonNegativeInt = 8
    """Of a request that is refused for now (429, 5xx) or gets no answer: after half a second, then
    twice as long each time up to 8 seconds, or as long as the endpoint says."""
    timeout_s: PositiveFloat = 120.0
    """For one answer."""


class EndpointError(PilotfishError, RuntimeError):
    """The endpoint refused a request, or gave no answer after all retries."""


class Reply(Config):
    """What came of one request; its tokens are those that the endpoint counts."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class ReplyStore:
    """A file of replies, one per line, each under a key; a line that was cut short is no reply."""

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        rows = [json.loads(line) for line in whole]
        self.replies = {row.pop("key"): Reply.model_validate(row) for row in rows}
        self._file = path.open("ab")
        self._file.truncate(sum(map(len, whole)))

    def add(self, key: str, reply: Reply) -> None:
        """Keep a reply; from here on it outlives this process."""
        line = json.dumps({"key": key, **reply.model_dump()}, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self.replies[key] = reply

    def close(self) -> None:
        self._file.close()


def ask_all(
    questions: Mapping[str, str], endpoint: EndpointConfig, path: Path
) -> dict[str, Reply]:
    """Return the reply to each question by its key, asking those alone that `path` does not hold.

    Raises `ConfigError` without an API key, and `EndpointError` for a request that fails for good;
    what was under way then still ends and is kept.
    """
    store = ReplyStore(path)
    try:
        missing = {key: text for key, text in questions.items() if key not in store.replies}
        if missing:
            asyncio.run(_ask(missing, endpoint, store, total=len(questions)))
        return {key: store.replies[key] for key in questions}
    finally:
        store.close()


async def _ask(
    missing: Mapping[str, str], endpoint: EndpointConfig, store: ReplyStore, *, total: int
) -> None:
    failures: list[OpenAIError] = []
    waiting = iter(missing.items())
    async with _client(endpoint) as client:
        with _bar(total, total - len(missing)) as bar:
            crew = range(min(endpoint.max_concurrent, len(missing)))
            await asyncio.gather(
                *(_work(waiting, client, endpoint, store, bar, failures) for _ in crew)
            )
    if failures:
        raise EndpointError(
            f"{endpoint.model} at {client.base_url} failed: {failures[0]}. {len(store.replies)} "
            "replies are kept; run this again, and it goes on from there."
        )


async def _work(
    waiting: Iterator[tuple[str, str]],
    client: AsyncOpenAI,
    endpoint: EndpointConfig,
    store: ReplyStore,
    bar: Any,
    failures: list[OpenAIError],
) -> None:
    """Ask one question after the other until none is left, or anybody has failed."""
    for key, text in waiting:
        try:
            answer = await client.chat.completions.create(
                model=endpoint.model,
                messages=[{"role": "user", "content": text}],
                extra_body=endpoint.request,
            )
            store.add(key, _read(answer))
        except OpenAIError as error:
            failures.append(error)
        else:
            bar.update()
        if failures:
            return


def _read(answer: ChatCompletion) -> Reply:
    # A proxy may send anything, and the client takes it for an answer.
    if not getattr(answer, "choices", None):
        raise OpenAIError(f"an answer without choices: {str(answer)[:200]!r}")
    used = answer.usage
    return Reply(
        text=answer.choices[0].message.content or "",
        prompt_tokens=used.prompt_tokens if used else 0,
        completion_tokens=used.completion_tokens if used else 0,
    )


def _client(endpoint: EndpointConfig) -> AsyncOpenAI:
    name = endpoint.api_key_env
    key = "none" if name is None else os.environ.get(name)
    if not key:
        raise ConfigError(
            f"endpoint.api_key_env is {name!r}, but there is no such environment variable. Set it "
            "to the key, or say api_key_env: null for an endpoint that asks for none."
        )
    return AsyncOpenAI(
        api_key=key,
        base_url=endpoint.base_url,
        max_retries=endpoint.max_retries,
        timeout=endpoint.timeout_s,
    )


def _bar(total: int, done: int) -> tqdm:
    return tqdm(
        desc="judging",
        total=total,
        initial=done,
        unit="reply",
        mininterval=refresh_seconds(),
        dynamic_ncols=True,
        disable=are_hidden(),
    )
