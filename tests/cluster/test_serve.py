"""One Serve application on a local cluster: what only real processes can show."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
import requests
import yaml
from ray import serve

from pilotfish import Pilot, SamplingParams
from tests.folders import save_base, save_guide

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
PORT = 18123
URL = f"http://127.0.0.1:{PORT}"
MESSAGES: Any = [{"role": "user", "content": "what did the cat do"}]


@dataclass(frozen=True)
class World:
    """The running application, and the same models in this process."""

    client: openai.OpenAI
    pilot: Pilot

    def stats(self) -> list[dict[str, int]]:
        handle: Any = serve.get_deployment_handle("BaseModel", "tiny")
        return handle.broadcast("stats").results()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("models")
    base, guide = save_base(folder / "base"), save_guide(folder / "guide", weight=0.5)
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump(_config(base, guide)))
    ray.init(
        num_cpus=4, object_store_memory=150 * 2**20, include_dashboard=True, log_to_driver=False
    )
    try:
        dashboard = f"http://{ray.get_runtime_context().worker.node.webui_url}"
        subprocess.run(
            [Path(sys.executable).parent / "serve", "deploy", config, "--address", dashboard],
            cwd=ROOT,
            check=True,
            capture_output=True,
            timeout=120,
        )
        _wait_until_ready(30)
        with openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as client:
            pilot = Pilot(base, {"near": guide}, device="cpu", dtype="float32")
            yield World(client, pilot)
    finally:
        serve.shutdown()
        ray.shutdown()


def _config(base: Path, guide: Path) -> dict[str, Any]:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", "OMP_NUM_THREADS": "1"}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": PORT},
        "applications": [
            {
                "name": "tiny",
                "route_prefix": "/",
                "import_path": "serve.app:build",
                "runtime_env": {"env_vars": environment},
                "args": {
                    "base": {"path": str(base), "num_replicas": 2, "num_slots": 8, "num_cpus": 0.5},
                    "guides": [
                        {"name": "near", "path": str(guide)},
                        {"name": "far", "path": str(guide), "placement": "remote", "num_cpus": 0.5},
                    ],
                    "ingress": {"token_deadline_s": 20},
                },
            }
        ],
    }


def _wait_until_ready(timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if requests.get(f"{URL}/ready", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(0.3)
    raise TimeoutError(f"no application at {URL} after {timeout_s} s: {serve.status()}")


def _expected(world: World, *, guides: dict[str, float], **params: Any) -> str:
    return world.pilot.generate([MESSAGES], SamplingParams(**params), guides=guides)[0].text


def test_a_chat_answer_is_the_text_that_pilot_writes(world: World) -> None:
    for seed in (1, 2, 3):
        answer = world.client.chat.completions.create(
            model="base:near", messages=MESSAGES, seed=seed, max_tokens=40
        )
        expected = _expected(world, guides={"near": 0.5}, seed=seed, max_tokens=40)
        assert answer.choices[0].message.content == expected
