"""`serve.guides`: other versions of guides while requests run, and what happens if they are bad."""

import asyncio
import shutil
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from pilotfish.errors import CheckpointError
from serve.catalog import GuideVersion
from tests.guide_versions import (
    Registry,
    application,
    drain,
    ids_of,
    names,
    request,
    run,
    until,
)
from tests.handles import LocalHandle

pytestmark = pytest.mark.usefixtures("quick")


def test_a_moved_alias_swaps_the_guide_on_all_replicas(registry: Registry) -> None:
    with application(registry, num_models=2) as app:

        async def use() -> None:
            assert await app.guides.reload() == [
                {"name": "helpful", "version": "1", "status": "unchanged"}
            ]
            registry.point("prod", "2")
            (said,) = await app.guides.reload("helpful")
            assert (said["status"], said["before"], said["version"]) == ("swapped", "1", "2")
            assert (await app.chosen()).version == "2"
            await app.until_loaded("2")
            drawn = [
                await drain(model.generate(request(await app.chosen(), max_tokens=20)))
                for model in app.models
            ]
            assert drawn == [registry.text("2", max_tokens=20)] * 2
            assert await app.guides.loaded() == {"": {"helpful@2": 2}}

        run(app, use)


def test_the_alias_is_looked_at_every_few_seconds(registry: Registry) -> None:
    with application(registry, guides_poll_s=0.05) as app:

        async def use() -> None:
            registry.point("prod", "2")
            await app.until_loaded("2")
            assert (await app.chosen()).version == "2"

        run(app, use)


def test_a_running_request_finishes_on_its_version_beside_the_next_one(registry: Registry) -> None:
    with application(registry) as app:

        async def use() -> None:
            (model,) = app.models
            old = await app.chosen()
            async with aclosing(model.generate(request(old, max_tokens=300))) as stream:
                drawn = ids_of(await anext(stream))
                registry.point("prod", "2")
                await app.guides.reload()
                new = await drain(model.generate(request(await app.chosen(), max_tokens=40)))
                assert names(model) == ["helpful@1", "helpful@2"]
                drawn += await drain(stream)
            assert drawn == registry.text("1", max_tokens=300)
            assert new == registry.text("2", max_tokens=40) != drawn[:40]
            await app.until_loaded("2")
            await until(lambda: list(model._decoding.engine.guides) == ["helpful@2"])

        run(app, use)


def test_a_request_for_a_version_that_is_gone_still_gets_it(registry: Registry) -> None:
    """One that fails over, say, to a replica that has never had it."""
    with application(registry) as app:

        async def use() -> None:
            old = await app.chosen()
            registry.point("prod", "2")
            await app.guides.reload()
            await app.until_loaded("2")
            drawn = await drain(app.models[0].generate(request(old, max_tokens=20)))
            assert drawn == registry.text("1", max_tokens=20)
            await app.until_loaded("2")

        run(app, use)


def test_broken_weights_are_refused_and_the_old_version_stays(registry: Registry) -> None:
    with application(registry, num_models=2) as app:

        async def use() -> None:
            registry.point("prod", "3")
            (said,) = await app.guides.reload()
            assert (said["status"], said["version"]) == ("refused", "1")
            assert "probabilities sum to nan" in said["reason"]
            assert (await app.chosen()).version == "1"
            await app.until_loaded("1")

        run(app, use)


def test_a_version_that_only_one_replica_can_load_is_served_by_none(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with application(registry, num_models=2) as app:

        def no_room(_: GuideVersion) -> Any:
            raise CheckpointError("no room")

        async def use() -> None:
            monkeypatch.setattr(app.models[1]._shelf, "_load", no_room)
            registry.point("prod", "2")
            (said,) = await app.guides.reload()
            assert (said["status"], said["reason"]) == ("refused", "no room")
            assert (await app.chosen()).version == "1"
            await app.until_loaded("1")

        run(app, use)


def test_what_was_refused_is_not_loaded_again_by_looking_only(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with application(registry, guides_poll_s=0.03) as app:
        loads: list[str] = []
        load = app.models[0]._shelf._load
        monkeypatch.setattr(
            app.models[0]._shelf, "_load", lambda v: [loads.append(v.version), load(v)][1]
        )

        async def use() -> None:
            registry.point("prod", "3")
            await until(lambda: loads == ["3"])
            await asyncio.sleep(0.5)
            assert loads == ["3"]
            (said,) = await app.guides.reload()  # by hand it is
            assert (said["status"], loads) == ("refused", ["3", "3"])
            registry.point("prod", "2")
            await app.until_loaded("2")

        run(app, use)


class Dies:
    """Calls of which the first few find their replica dying."""

    def __init__(self, num_deaths: float) -> None:
        self.num_deaths = num_deaths

    def __call__(self, call: Any) -> Any:
        if self.num_deaths <= 0:
            return call
        self.num_deaths -= 1
        call.cancel()
        return _Dead()


class _Dead:
    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        raise ActorDiedError


@pytest.mark.parametrize(("num_deaths", "status"), [(1, "swapped"), (float("inf"), "refused")])
def test_a_version_that_kills_whoever_loads_it_is_refused(
    registry: Registry, num_deaths: float, status: str
) -> None:
    with application(registry) as app:

        async def use() -> None:
            dies = Dies(num_deaths)
            app.guides._replicas[""]._replicas = lambda: [LocalHandle(app.models[0], dies)]
            registry.point("prod", "2")
            (said,) = await app.guides.reload()
            assert said["status"] == status
            assert (await app.chosen()).version == ("2" if status == "swapped" else "1")

        run(app, use)


def test_a_restarted_control_learns_the_newest_catalog_from_whoever_follows(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.guides._LONG_POLL_S", 0.05)
    with application(registry) as app:

        async def use() -> None:
            registry.point("prod", "2")
            await app.guides.reload()
            await app.until_loaded("2")
            (model,) = app.models
            newest = model._stock._following.catalog
            app.guides = app.control()
            assert (await app.chosen()).version == "1"
            await until(lambda: app.guides._catalog == newest)
            assert (await app.chosen()).version == "2"

        run(app, use)


def test_replicas_of_two_deployments_do_not_mix_their_catalogs(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.guides._LONG_POLL_S", 0.05)
    with application(registry) as app:

        async def use() -> None:
            before = await app.guides.catalog()
            for revision in (0, 5):
                foreign = replace(before, created=2, revision=revision)
                assert await app.guides.changes(foreign) is None
                assert await app.guides.catalog() == before

        run(app, use)


def test_a_new_replica_serves_what_is_served_now_if_the_first_version_is_gone(
    registry: Registry, tmp_path: Path
) -> None:
    """The folder was overwritten, say, and the guide reloaded, since the application started."""
    folder = tmp_path / "guide"
    shutil.copytree(registry.folders["1"], folder)
    guides = [{"name": "helpful", "path": str(folder)}]
    with application(registry, guides=guides) as app:

        async def use() -> None:
            shutil.copytree(registry.folders["2"], folder, dirs_exist_ok=True)
            (said,) = await app.guides.reload()
            assert said["status"] == "swapped"
            app.models.append(app.model())
            await app.models[1].check_health()
            new = await app.chosen()
            assert await app.loaded() == [[new.key], [new.key]]
            drawn = await drain(app.models[1].generate(request(new, max_tokens=20)))
            assert drawn == registry.text("2", max_tokens=20)

        run(app, use)


def test_a_replica_that_has_nothing_to_serve_is_unhealthy(
    registry: Registry, tmp_path: Path
) -> None:
    folder = tmp_path / "guide"
    shutil.copytree(registry.folders["1"], folder)
    with application(registry, guides=[{"name": "helpful", "path": str(folder)}]) as app:

        async def use() -> None:
            shutil.copytree(registry.folders["2"], folder, dirs_exist_ok=True)
            app.models.append(app.model())
            for _ in range(2):
                with pytest.raises(CheckpointError, match="it was overwritten while it was served"):
                    await app.models[1].check_health()

        run(app, use)
