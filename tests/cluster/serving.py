"""An application on the test cluster, deployed as a user would deploy it, and clients of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import requests
from ray import serve

from jobs.cluster import REPOSITORY
from jobs.serving import application, free_port, write_serve_config


class Deployed:
    """A running application, whose processes can be looked at and hurt."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url

    @property
    def is_ready(self) -> bool:
        try:
            return requests.get(f"{self.url}/ready", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def stats(self, deployment: str) -> list[dict[str, Any]]:
        """Ask every replica of a deployment."""
        handle: Any = serve.get_deployment_handle(deployment, self.name)
        return handle.broadcast("stats").results()

    def has_running(self, deployment: str, number: int) -> bool:
        """Whether so many replicas of a deployment run, and none is on its way up or down."""
        states = serve.status().applications[self.name].deployments[deployment].replica_states
        return states == {"RUNNING": number}

    def processes(self, deployment: str) -> list[psutil.Process]:
        """Return the processes of a deployment's replicas on this machine."""
        title = f"ServeReplica:{self.name}:{deployment}"
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            if title in " ".join(process.info["cmdline"] or ()):
                found.append(process)
        return found

    def kill(self, process: psutil.Process, how: signal.Signals = signal.SIGKILL) -> None:
        os.kill(process.pid, how)

    def client(self, **settings: Any) -> openai.AsyncOpenAI:
        settings = {"api_key": "none", "max_retries": 0, **settings}
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **settings)


def deploy(dashboard: str, config: Path, *, timeout_s: float = 120) -> None:
    """Send a config to the cluster, as `serve deploy` does."""
    command = [str(Path(sys.executable).parent / "serve"), "deploy", str(config)]
    subprocess.run(
        [*command, "--address", dashboard],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        timeout=timeout_s,
    )


@contextmanager
def deployed(
    dashboard: str, folder: Path, args: dict[str, Any], *, name: str, timeout_s: float = 120
) -> Iterator[Deployed]:
    """Send an application to the cluster with `serve deploy`; take it down in the end."""
    port = free_port(0)
    config = folder / f"{name}.yaml"
    one = application(name, args, OMP_NUM_THREADS="1")
    write_serve_config(config, [one], port=port, proxy_location="HeadOnly")
    try:
        deploy(dashboard, config, timeout_s=timeout_s)
        running = Deployed(name, f"http://127.0.0.1:{port}")
        until(lambda: running.is_ready, timeout_s=timeout_s)
        yield running
    finally:
        serve.shutdown()


class Reader:
    """One client of a stream, which takes up an answer that broke off where it broke off."""

    def __init__(self, client: openai.AsyncOpenAI, **body: Any) -> None:
        self._client, self._body = client, body
        self.ids: list[int] = []
        self.num_breaks = 0
        self.finish_reason: str | None = None
        self.guides: Sequence[dict[str, Any]] = ()

    async def read(self, *, max_breaks: int = 5) -> list[int]:
        """Read to the end. Raises what the last connection broke with."""
        while self.finish_reason is None:
            try:
                await self._read()
            except (openai.APIConnectionError, openai.InternalServerError, openai.APIError):
                self.num_breaks += 1
                if self.num_breaks > max_breaks:
                    raise
        return self.ids

    async def _read(self) -> None:
        extra = {"return_token_ids": True, **self._body.get("extra_body", {})}
        if self.ids:
            extra["completed_token_ids"] = list(self.ids)
        body = {**self._body, "stream": True, "extra_body": extra}
        stream = await self._client.chat.completions.create(**body)
        async for chunk in stream:
            for choice in chunk.choices:
                self.ids += (choice.model_extra or {}).get("token_ids") or []
                self.finish_reason = choice.finish_reason or self.finish_reason
            self.guides = (chunk.model_extra or {}).get("guides") or self.guides
        if self.finish_reason is None:
            raise openai.APIConnectionError(message="the stream ended early", request=None)  # type: ignore[arg-type]


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait for something to become so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {timeout_s} s"
        time.sleep(0.05)
