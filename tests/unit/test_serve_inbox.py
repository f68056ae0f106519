"""Tokens that go to an ingress past Serve: `serve.api.inbox` and `serve.replicas.streams`."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from pilotfish.decode.sequence import FinishReason, TokenEvent
from serve import frames
from serve.api.calls import Calls, drain
from serve.api.inbox import Inbox
from serve.api.journal import Journal, Patience
from serve.errors import EngineError
from serve.replicas.lines import Line, Lines
from serve.replicas.streams import Posted, hand_out
from serve.wire import GuideUse, Token
from tests.handles import LocalHandle, LocalStream
from tests.http_api import Server

HOST = "127.0.0.1"
PROMPT = [40, 41, 42, 43]
NUM_TOKENS = 12
PATIENCE = Patience(first_token_s=20, token_s=20, max_attempts=3)


def journal(server: Server, seed: int, **fields: Any) -> Journal:
    [helpful] = [guide for guide in server.catalog.guides if guide.name == "helpful"]
    params = {"seed": seed, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    guides = [GuideUse(helpful.current, 0.7)]
    return Journal(
        **{"request_id": f"r{seed}", "prompt_ids": PROMPT, "params": params, "guides": guides},
        **fields,
    )


class Watched:
    """The stream of a call: counts what comes through it, and may be made to die."""

    def __init__(self, stream: LocalStream, dies: Callable[[], bool]) -> None:
        self.num_items = 0
        self._stream, self._dies = stream, dies

    async def __anext__(self) -> Any:
        item = asyncio.ensure_future(self._stream.__anext__())
        while not item.done():
            if self._dies():
                item.cancel()
                raise ActorDiedError
            await asyncio.wait([item], timeout=0.001)
        said = item.result()
        self.num_items += 1
        return said

    def cancel(self) -> None:
        self._stream.cancel()


class Watch:
    """Watches every call to a replica; `dies` says when the first of them breaks."""

    def __init__(self, dies: Callable[[], bool] = lambda: False) -> None:
        self.calls: list[Watched] = []
        self._dies = dies

    def __call__(self, call: Any) -> Any:
        if isinstance(call, LocalStream):
            call = Watched(call, (lambda: False) if self.calls else self._dies)
            self.calls.append(call)
        return call


def run(use: Callable[[Inbox], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        inbox = Inbox(HOST)
        await inbox.ensure()
        try:
            return await use(inbox)
        finally:
            inbox.close()
            await asyncio.sleep(0.05)  # the other ends notice

    return asyncio.run(whole())


def calls(server: Server, watch: Watch, inbox: Inbox | None) -> Calls:
    found = Calls(LocalHandle(server.model, watch), {}, PATIENCE)
    found.inbox = inbox
    return found


async def decode(made: Calls, journals: list[Journal]) -> list[list[Token]]:
    return list(await asyncio.gather(*(drain(made.decode(one, None)) for one in journals)))


def test_posted_tokens_are_those_that_come_with_the_calls(server: Server) -> None:
    seeds = range(6)
    pulled, posted = Watch(), Watch()
    expected = asyncio.run(
        decode(calls(server, pulled, None), [journal(server, seed) for seed in seeds])
    )

    async def use(inbox: Inbox) -> list[list[Token]]:
        journals = [journal(server, seed) for seed in seeds]
        return await decode(calls(server, posted, inbox), journals)

    assert run(use) == expected
    assert all(call.num_items > 0 for call in pulled.calls)
    assert [call.num_items for call in posted.calls] == [0] * 6


@asynccontextmanager
async def line_to(note: Callable[..., Awaitable[None]]) -> AsyncIterator[Line]:
    """Open a line to who takes `note` of it and then hangs up."""
    listening = await asyncio.start_server(note, HOST, 0)
    port = listening.sockets[0].getsockname()[1]
    line = await Lines().to(frames.ReplyTo(HOST, port, "secret", 7))
    assert line is not None
    async with asyncio.timeout(20):
        yield line
        while not line.is_closed:
            await asyncio.sleep(0.01)
    listening.close()


@pytest.mark.parametrize("pauses", list(itertools.product((False, True), repeat=4)))
def test_no_token_is_lost_however_many_come_at_once(pauses: Sequence[bool]) -> None:
    """Whether the event loop gets to send them in between or not."""
    frames_read: list[Any] = []

    async def use() -> None:
        over = asyncio.Event()

        async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(asyncio.IncompleteReadError):
                while not (frames_read and frames_read[-1][-1][1][-1][5] == "stop"):
                    said = await frames.read(reader)
                    frames_read.extend([] if said == ("secret",) else [said])
            writer.close()
            over.set()

        async with line_to(note) as line:
            stream = Posted(line, 7)
            for index, pause in enumerate((*pauses, False)):
                items = [event(index, is_last=index == len(pauses))]
                hand_out([(stream, items)], asyncio.get_running_loop())
                if pause:
                    await asyncio.sleep(0)
            assert [batch async for batch in stream.batches()] == []
            await over.wait()

    asyncio.run(use())
    positions = [token[0] for [(_, tokens, *_)] in frames_read for token in tokens]
    assert positions == [0, 1, 2, 3, 4]


def test_who_sends_does_not_wait_for_an_ingress_that_reads_slowly() -> None:
    sent = [[number, "x" * 10_000] for number in range(3_000)]  # 30 MB, more than buffers take

    async def use() -> list[Any]:
        received: list[Any] = []
        may_read, over = asyncio.Event(), asyncio.Event()

        async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await may_read.wait()
            assert await frames.read(reader) == ("secret",)
            while len(received) < len(sent):
                received.append(list(await frames.read(reader)))
            writer.close()
            over.set()

        async with line_to(note) as line:

            def send() -> None:
                for one in sent:
                    line.send(frames.pack(one))

            await asyncio.to_thread(send)
            may_read.set()
            await over.wait()
        return received

    assert asyncio.run(use()) == sent


def event(index: int, *, is_last: bool) -> TokenEvent:
    reason = FinishReason.STOP if is_last else None
    return TokenEvent(
        key=0, index=index, token_id=9, logprob=0, base_logprob=0, kl=0, finish_reason=reason
    )


def test_what_is_read_of_a_prompt_is_posted_too(server: Server) -> None:
    async def use(inbox: Inbox) -> Journal:
        one = journal(server, 1, read_from=0)
        await decode(calls(server, Watch(), inbox), [one])
        return one

    assert [token.position for token in run(use).readings] == [1, 2, 3]


def test_a_call_that_breaks_goes_on_behind_what_was_posted(server: Server) -> None:
    [expected] = asyncio.run(decode(calls(server, Watch(), None), [journal(server, 4)]))
    one = journal(server, 4)
    watch = Watch(dies=lambda: len(one.completed) >= 3)

    async def use(inbox: Inbox) -> list[list[Token]]:
        return await decode(calls(server, watch, inbox), [one])

    [tokens] = run(use)
    assert tokens == expected
    assert (len(watch.calls), one.num_failovers) == (2, 1)


def test_where_no_line_leads_tokens_come_with_the_call(server: Server) -> None:
    async def nowhere(inbox: Inbox) -> frames.ReplyTo:
        inbox.close()
        return frames.ReplyTo(HOST, 1, "", 0)

    async def use(inbox: Inbox) -> list[Any]:
        request = journal(server, 2).request()
        request["reply_to"] = await nowhere(inbox)
        return [batch async for batch in server.model.generate(request)]

    tokens = [token for batch in run(use) for token in batch[0]]
    assert [token[0] for token in tokens] == list(range(NUM_TOKENS))


def test_a_line_that_breaks_ends_its_streams_and_frees_their_slots(server: Server) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await frames.read(reader)
        await frames.read(reader)
        writer.close()

    async def use() -> None:
        listening = await asyncio.start_server(hang_up, HOST, 0)
        port = listening.sockets[0].getsockname()[1]
        request = journal(server, 3).request()
        request["params"] = {**request["params"], "max_tokens": 200}
        request["reply_to"] = frames.ReplyTo(HOST, port, "anything", 0)
        with pytest.raises(EngineError, match="connection to the ingress"):
            async for _ in server.model.generate(request):
                pass
        listening.close()
        async with asyncio.timeout(10):
            while (await server.model.stats())["num_open"]:
                await asyncio.sleep(0.01)

    asyncio.run(use())


@pytest.mark.parametrize(
    "said",
    [
        frames.pack(["not the secret"]),
        frames.pack([]),
        b"\xff\xff\xff\xff",
        b"\0\0\0\1\xc1",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_a_stranger_is_shown_out_and_others_are_served_on(server: Server, said: bytes) -> None:
    async def use(inbox: Inbox) -> list[list[Token]]:
        request = journal(server, 0).request()
        _ = inbox.call(request, lambda _: LocalStream(_silence()))
        reply_to = request.get("reply_to")
        assert reply_to is not None
        reader, writer = await asyncio.open_connection(HOST, reply_to.port)
        writer.write(said)
        writer.write(frames.pack([[reply_to.key, [[0, 1, 0.0, 0.0, 0.0, "stop"]]]]))
        with suppress(ConnectionError):
            writer.write_eof()
            async with asyncio.timeout(10):
                assert await reader.read() == b""
        writer.close()
        return await decode(calls(server, Watch(), inbox), [journal(server, 5)])

    [tokens] = run(use)
    assert len(tokens) == NUM_TOKENS


async def _silence() -> Any:
    await asyncio.sleep(0.01)
    for nothing in ():
        yield nothing
