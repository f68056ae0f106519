"""`serve.guides`: canaries, and guides that are switched off while requests run."""

import asyncio

import pytest

from serve.catalog import GuideVersion
from serve.errors import APIError, GuideUnavailableError
from serve.wire import Batch
from tests.guide_versions import (
    Registry,
    application,
    drain,
    ids_of,
    request,
    run,
    until,
)

pytestmark = pytest.mark.usefixtures("quick")


def test_an_unknown_guide_is_not_found(registry: Registry) -> None:
    with application(registry) as app:

        async def use() -> None:
            for call in (app.guides.reload("unheard"), app.guides.change("unheard", {})):
                with pytest.raises(APIError) as caught:
                    await call
                assert (caught.value.status, caught.value.code) == (404, "guide_not_found")

        run(app, use)


def test_a_canary_answers_its_share_of_the_requests_by_their_ids(registry: Registry) -> None:
    with application(registry) as app:

        async def versions() -> list[str]:
            return [(await app.chosen(f"request {number}")).version for number in range(200)]

        async def use() -> None:
            canary = {"path": "models:/helpful/2", "share": 0.25}
            entry = await app.guides.change("helpful", {"canary": canary})
            assert [version.version for version in entry.versions] == ["1", "2"]
            found = await versions()
            assert 30 <= found.count("2") <= 70
            assert found == await versions()
            await app.until_loaded("1", "2")
            await app.guides.change("helpful", {"canary": None})
            assert set(await versions()) == {"1"}
            await app.until_loaded("1")

        run(app, use)


def test_a_canary_that_becomes_the_version_served_is_no_canary_any_more(registry: Registry) -> None:
    with application(registry) as app:

        async def use() -> None:
            trial = {"path": "models:/helpful/2", "share": 0.5}
            await app.guides.change("helpful", {"canary": trial, "shadow": trial})
            registry.point("prod", "2")
            await app.guides.reload()
            (entry,) = (await app.guides.catalog()).guides
            assert (entry.current.version, entry.canary, entry.shadow) == ("2", None, None)

        run(app, use)


@pytest.mark.parametrize("path", ["models:/helpful/3", "models:/helpful/9", "no/such/folder"])
def test_a_version_that_cannot_be_tried_is_a_conflict_and_changes_nothing(
    registry: Registry, path: str
) -> None:
    with application(registry) as app:

        async def use() -> None:
            good = {"path": "models:/helpful/2", "share": 0.5}
            bad = {"path": path, "share": 0.5}
            with pytest.raises(APIError, match="cannot be tried") as caught:
                await app.guides.change("helpful", {"canary": good, "shadow": bad})
            assert (caught.value.status, caught.value.param) == (409, "shadow")
            (entry,) = (await app.guides.catalog()).guides
            assert (entry.canary, entry.shadow) == (None, None)
            await app.until_loaded("1")

        run(app, use)


def test_a_guide_that_is_switched_off_ends_its_requests_or_frees_them(registry: Registry) -> None:
    with application(registry) as app:

        async def use() -> None:
            (model,) = app.models
            version = await app.chosen()
            bound = model.generate(request(version, max_tokens=900))
            free = model.generate(request(version, max_tokens=900, on_failure="base", seed=4))
            drawn = [ids_of(await anext(stream)) for stream in (bound, free)]
            await app.guides.change("helpful", {"enabled": False})
            with pytest.raises(GuideUnavailableError, match="it was switched off"):
                await drain(bound)
            gave_up: list[str] = []
            async for sent in free:
                gave_up += [name for name, _ in Batch(*sent).gave_up]
                drawn[1] += ids_of(sent)
            assert (gave_up, len(drawn[1])) == (["helpful"], 900)
            # Requests of an ingress that has not heard of it yet.
            with pytest.raises(GuideUnavailableError, match="it was switched off"):
                await drain(model.generate(request(version, max_tokens=5)))
            late = request(version, max_tokens=5, on_failure="base")
            batches = [Batch(*sent) async for sent in model.generate(late)]
            assert batches[0] == Batch([], [("helpful", 0)])
            assert sum(len(batch.tokens) for batch in batches) == 5
            with pytest.raises(APIError, match="is switched off"):
                await app.chosen()
            await app.guides.change("helpful", {"enabled": True})
            await until(lambda: not model._off)
            assert len(await drain(model.generate(request(version, max_tokens=5)))) == 5

        run(app, use)


def test_switching_off_does_not_wait_for_what_is_being_loaded(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with application(registry) as app:

        async def use() -> None:
            loading, loaded = asyncio.Event(), asyncio.Event()
            prepare = app.models[0].prepare

            async def slow(version: GuideVersion) -> None:
                loading.set()
                await loaded.wait()
                await prepare(version)

            monkeypatch.setattr(app.models[0], "prepare", slow)
            registry.point("prod", "2")
            reload = asyncio.create_task(app.guides.reload())
            await loading.wait()
            await app.guides.change("helpful", {"enabled": False})
            loaded.set()
            await reload
            (entry,) = (await app.guides.catalog()).guides
            assert (entry.current.version, entry.enabled) == ("2", False)

        run(app, use)
