"""Replicas of guides in two versions: `serve.replicas.guide_model` and `response_guide`."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish import Pilot, SamplingParams
from pilotfish.errors import CheckpointError
from pilotfish.models.loading import load_frozen
from serve.artifacts import folder_version, pin
from serve.catalog import GuideVersion, make_catalog
from serve.config import ServeConfig, parse_args
from serve.errors import GuideUnavailableError
from serve.guides import Guides
from serve.replicas.base_model import BaseModel
from serve.replicas.guide_model import GuideModel
from serve.replicas.remote_guide import RemoteLM
from serve.replicas.response_guide import ResponseGuide
from serve.wire import GenerateRequest
from tests.fakes import context, plain_logprobs
from tests.folders import save_aligner, save_base, save_guide
from tests.guide_versions import PROMPT, break_weights, drain, ids_of, request, until
from tests.handles import LocalHandle, LocalReplicas, LocalVisits


class World:
    """A base; a guide LM and a rewriting guide, both in versions 1, 2 and 3, which is broken."""

    def __init__(self, folder: Path) -> None:
        self.base = save_base(folder / "base")
        self.far = [save_guide(folder / f"far{seed}", seed=seed) for seed in (1, 2, 3)]
        self.aligner = [save_aligner(folder / f"aligner{seed}", seed=seed) for seed in (4, 5, 6)]
        break_weights(self.far[2])
        break_weights(self.aligner[2])

    def config(self, far: Path, aligner: Path) -> ServeConfig:
        remote = {"placement": "remote", "timeout_s": 8}
        return parse_args(
            {
                "base": {"path": str(self.base), "num_slots": 4},
                "guides": [
                    {"name": "far", "path": str(far), "precision": "full", **remote},
                    {"name": "aligner", "path": str(aligner), **remote},
                ],
            }
        )


class Application:
    """A replica of everything but the ingress."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.config = world.config(world.far[0], world.aligner[0])
        self.catalog = make_catalog(self.config, created=1)
        self.left = threading.Event()

        def control() -> LocalHandle:
            return LocalHandle(self.guides)

        far = self.config.guide("far")
        self.far = GuideModel(
            far, self.catalog, num_slots=4, host=lambda: "127.0.0.1", control=control
        )
        self.model = BaseModel(
            self.config, self.catalog, {"far": LocalVisits(self.far)}, control=control
        )
        self.aligner = ResponseGuide(
            self.config, "aligner", self.catalog, control=control, leave=self.left.set
        )
        replicas = {"": self.model, "far": self.far, "aligner": self.aligner}
        self.guides = Guides(
            self.config, self.catalog, {name: _all_of(one) for name, one in replicas.items()}
        )

    async def start(self) -> None:
        for replica in (self.guides, self.far, self.model, self.aligner):
            await replica.check_health()

    async def change(self, name: str, **change: Any) -> GuideVersion:
        """Change a guide, and return the version that a canary would be."""
        entry = await self.guides.change(name, change)
        return entry.current if entry.canary is None else entry.canary.version

    async def version(self, name: str) -> GuideVersion:
        entry = (await self.guides.catalog()).guide(name)
        assert entry is not None
        return entry.current

    def ask_far(self, version: GuideVersion) -> torch.Tensor:
        """Return the law behind the prompt, as a base replica asks for it."""
        far, size = self.config.guide("far"), self.catalog.base.vocab_size
        lm = RemoteLM(
            LocalVisits(self.far), far, version, vocab_size=size, device=torch.device("cpu")
        )
        return lm.begin([context(0, PROMPT)])()

    def close(self) -> None:
        self.model.close()
        self.far.close()
        self.aligner.close()


def _all_of(replica: object) -> LocalReplicas:
    return LocalReplicas(lambda: [LocalHandle(replica)])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("models"))


@pytest.fixture
def app(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Application]:
    monkeypatch.setattr("serve.replicas.following._RETRY_S", 0.05)
    app = Application(world)
    yield app
    app.close()


def run(app: Application, use: Any) -> None:
    async def started() -> None:
        async with asyncio.timeout(40):
            await app.start()
            await use()

    asyncio.run(started())


def test_a_guide_replica_answers_for_two_versions_at_a_time(
    app: Application,
) -> None:
    async def use() -> None:
        old = await app.version("far")
        new = await app.change("far", canary={"path": str(app.world.far[1]), "share": 0.5})
        for version, folder in ((old, app.world.far[0]), (new, app.world.far[1])):
            law_RV = await asyncio.to_thread(app.ask_far, version)
            model: Any = load_frozen(folder, device="cpu", dtype="float32")
            torch.testing.assert_close(law_RV[0], plain_logprobs(model, PROMPT))
        assert await app.guides.loaded() == {
            "": {old.key: 1, new.key: 1},
            "far": {old.key: 1, new.key: 1},
            "aligner": {(await app.version("aligner")).key: 1},
        }

    run(app, use)


def test_a_remote_guide_is_swapped_at_its_own_replicas_and_at_the_base(app: Application) -> None:
    async def use() -> None:
        old = await app.version("far")
        new = await app.change("far", canary={"path": str(app.world.far[1]), "share": 0.5})
        drawn = [
            await drain(app.model.generate(request(each, max_tokens=20))) for each in (old, new)
        ]
        for ids, folder in zip(drawn, app.world.far, strict=False):
            assert ids == _drawn(app.world.base, {"far": folder}, max_tokens=20)
        await app.change("far", canary=None)
        await until(lambda: new not in app.model._shelf.loaded)

    run(app, use)


def _drawn(base: Path, guides: dict[str, Path], **params: Any) -> list[int]:
    pilot = Pilot(base, guides, device="cpu")
    sampling = SamplingParams(**{"seed": 3, "ignore_eos": True, **params})
    prompt, weights = str(pilot.tokenizer.decode(PROMPT)), dict.fromkeys(guides, 1.0)
    return list(pilot.generate([prompt], sampling, guides=weights)[0].token_ids)


@pytest.mark.parametrize("name", ["far", "aligner"])
def test_broken_weights_of_a_guide_with_replicas_of_its_own_are_refused(
    app: Application, name: str
) -> None:
    async def use() -> None:
        folders = app.world.far if name == "far" else app.world.aligner
        old = await app.version(name)
        with pytest.raises(Exception, match="probabilities sum to nan"):
            await app.change(name, canary={"path": str(folders[2]), "share": 1})
        assert await app.version(name) == old
        shelves = [app.far._shelf, app.model._shelf, app.aligner._shelf]
        await until(lambda: sum(len(shelf.loaded) for shelf in shelves) == 3)

    run(app, use)


def revision(**params: Any) -> GenerateRequest:
    sent = request(GuideVersion("none", "", pin("x", None), "genarm", 1.0), **params)
    return GenerateRequest(**{**sent, "guides": []})


def test_a_rewriting_guide_decodes_with_its_own_lm_in_each_version(app: Application) -> None:
    async def use() -> None:
        old = await app.version("aligner")
        stream = app.aligner.generate(revision(max_tokens=300), old)
        async with aclosing(stream):
            drawn = ids_of(await anext(stream))
            trial = {"path": str(app.world.aligner[1]), "share": 0.5}
            new = await app.change("aligner", canary=trial)
            other = await drain(app.aligner.generate(revision(max_tokens=20), new))
            await app.change("aligner", canary=None)
            await until(lambda: set(app.aligner._shelf.loaded) == {old})
            drawn += await drain(stream)
        assert drawn == _drawn(app.world.aligner[0], {}, max_tokens=300)
        assert other == _drawn(app.world.aligner[1], {}, max_tokens=20) != drawn[:20]
        assert (await app.aligner.stats())["num_open"] == 0

    run(app, use)


def test_a_rewritten_answer_goes_on_behind_the_tokens_of_another_replica(app: Application) -> None:
    async def use() -> None:
        version = await app.version("aligner")
        whole = await drain(app.aligner.generate(revision(max_tokens=20), version))
        rest = GenerateRequest(**{**revision(max_tokens=20), "completed": whole[:7]})
        assert await drain(app.aligner.generate(rest, version)) == whole[7:]

    run(app, use)


def test_a_rewriting_guide_that_is_switched_off_ends_what_it_writes(app: Application) -> None:
    async def use() -> None:
        version = await app.version("aligner")
        stream = app.aligner.generate(revision(max_tokens=900), version)
        await anext(stream)
        await app.change("aligner", enabled=False)
        with pytest.raises(GuideUnavailableError, match="it was switched off"):
            await drain(stream)
        with pytest.raises(GuideUnavailableError, match="it was switched off"):
            await drain(app.aligner.generate(revision(max_tokens=5), version))
        await app.change("aligner", enabled=True)
        await until(lambda: not app.aligner._off)
        assert len(await drain(app.aligner.generate(revision(max_tokens=5), version))) == 5

    run(app, use)


def test_a_folder_that_was_overwritten_is_not_loaded_as_the_version_it_was(
    world: World, tmp_path: Path
) -> None:
    folder = save_guide(tmp_path / "guide", seed=1)
    artifact = pin(str(folder), None)
    version = folder_version(folder)
    save_guide(folder, seed=2)
    with pytest.raises(CheckpointError, match="it was overwritten while it was served"):
        artifact.load(version)


def test_settings_of_one_request_come_and_go_while_others_use_them(app: Application) -> None:
    """The guide of the second request is added before that of the first one is removed."""

    async def use() -> None:
        engine = app.model._decoding.engine
        version = await app.version("far")
        before = set(engine.guides)
        step = engine.step

        def slow() -> Any:
            threading.Event().wait(0.01)
            return step()

        engine.step = slow
        asked = request(version, args={"gate": 0.5}, max_tokens=3)
        for _ in range(5):
            assert len(await drain(app.model.generate(asked))) == 3
        engine.step = step
        await until(lambda: set(engine.guides) == before)

    run(app, use)
