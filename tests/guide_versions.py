"""Guides in several versions, replicas that serve them, and `Guides` above, in this process."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import torch
from safetensors.torch import load_file, save_file

from pilotfish import Pilot, SamplingParams
from serve.catalog import Catalog, GuideVersion, make_catalog
from serve.choosing import choose
from serve.config import ServeConfig, parse_args
from serve.guides import Guides
from serve.replicas.base_model import BaseModel
from serve.wire import Batch, GenerateRequest, GuideUse, OnFailure
from tests.folders import save_base, save_guide
from tests.handles import LocalHandle, LocalReplicas

PROMPT = [40, 41, 42, 43]


class Registry:
    """A base, and an MLflow registry with versions 1 and 2 of a guide, and 3, which is broken."""

    def __init__(self, folder: Path) -> None:
        self.base = save_base(folder / "base")
        self.folders = {str(seed): save_guide(folder / f"v{seed}", seed=seed) for seed in (1, 2, 3)}
        break_weights(self.folders["3"])
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.client = mlflow.MlflowClient(tracking_uri=self.uri)
        self.client.create_registered_model("helpful")
        for source in self.folders.values():
            self.client.create_model_version("helpful", source=str(source))

    def point(self, alias: str, version: str) -> None:
        self.client.set_registered_model_alias("helpful", alias, version)

    def text(self, version: str, **params: Any) -> list[int]:
        """Return the ids that the Pilot draws with one version of the guide."""
        pilot = Pilot(self.base, {"helpful": self.folders[version]}, device="cpu")
        prompt = str(pilot.tokenizer.decode(PROMPT))
        assert pilot.tokenizer.encode(prompt) == PROMPT
        sampling = SamplingParams(**{"ignore_eos": True, "seed": 3, **params})
        return list(pilot.generate([prompt], sampling, guides={"helpful": 1.0})[0].token_ids)


def break_weights(folder: Path) -> None:
    """Make a model NaN behind almost all tokens: it can be loaded, and nothing else."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][8:] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


class Application:
    """Base replicas and `Guides` of one guide that follows an alias."""

    def __init__(self, registry: Registry, alias: str, *, num_models: int = 1, **args: Any) -> None:
        self.config: ServeConfig = parse_args(
            {
                "base": {"path": str(registry.base), "num_slots": 4},
                "guides": [{"name": "helpful", "path": f"models:/helpful@{alias}"}],
                "tracking_uri": registry.uri,
                "guides_poll_s": 0,
                **args,
            }
        )
        self.catalog: Catalog = make_catalog(self.config, created=1)
        self.models = [self.model() for _ in range(num_models)]
        self.guides = self.control()

    def model(self) -> BaseModel:
        """Return one more replica of the base."""
        return BaseModel(
            self.config, self.catalog, {}, control=lambda: LocalHandle(self.guides), leave=_stay
        )

    def control(self, catalog: Catalog | None = None) -> Guides:
        handles = LocalReplicas(lambda: [LocalHandle(model) for model in self.models])
        return Guides(self.config, catalog or self.catalog, {"": handles})

    async def start(self) -> None:
        """Do what Serve does first and then every other second."""
        for replica in (self.guides, *self.models):
            await replica.check_health()

    def close(self) -> None:
        for model in self.models:
            model.close()

    async def loaded(self) -> list[list[str]]:
        return [(await model.stats())["guides"] for model in self.models]

    async def until_loaded(self, *versions: str) -> None:
        wanted = [f"helpful@{version}" for version in versions]
        await until(lambda: all(names(model) == wanted for model in self.models))

    async def chosen(self, request_id: str = "r") -> GuideVersion:
        """Return the version that a request which names the guide gets now."""
        catalog = await self.guides.catalog()
        return choose(catalog, "base:helpful", None, request_id=request_id).uses[0].version


def names(model: BaseModel) -> list[str]:
    return sorted(version.key for version in model._shelf.loaded)


def _stay() -> None:
    raise AssertionError("the decode loop died")


def request(
    version: GuideVersion,
    *,
    on_failure: OnFailure = "fail",
    args: dict[str, Any] | None = None,
    **params: Any,
) -> GenerateRequest:
    return GenerateRequest(
        prompt_ids=PROMPT,
        messages=None,
        text=None,
        params={"seed": 3, "ignore_eos": True, **params},
        guides=[GuideUse(version, 1.0, args or {}, on_failure)],
        draft=None,
        completed=[],
        gave_up=[],
        attempt="r#0",
    )


async def drain(stream: Any) -> list[int]:
    """Return the ids of the rest of a stream."""
    return [token[1] async for sent in stream for token in Batch(*sent).tokens]


def ids_of(sent: Sequence[Any]) -> list[int]:
    return [token[1] for token in Batch(*sent).tokens]


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


@contextmanager
def application(
    registry: Registry, *, version: str = "1", **settings: Any
) -> Iterator[Application]:
    registry.point("prod", version)
    app = Application(registry, "prod", **settings)
    try:
        yield app
    finally:
        app.close()


def run(app: Application, use: Callable[[], Awaitable[None]]) -> None:
    async def started() -> None:
        async with asyncio.timeout(40):
            await app.start()
            await use()

    asyncio.run(started())
