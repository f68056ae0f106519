"""An API that answers from a script: quick, and as slow, full or broken as a test wants it."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serve.playground.page import playground_routes

TEXT = "rinse the rice , then boil it with two onions until it is soft ."
WORDS = TEXT.split()
MOVES = (0.0, 0.3, 1.0, 2.0, 4.0, -0.3, -1.0, -2.0, -4.0)
"""Nats by which a guide of weight 1 moves one token after the other."""


def guide_card(name: str, kind: str, **fields: Any) -> dict[str, Any]:
    known = {"stage": "token", "weight": 1.0, "version": "7"}
    known |= {"takes_weight": True, "enabled": True}
    return {"id": f"base:{name}", "parent": "base", "guide": {"kind": kind, **known, **fields}}


CARDS = [
    {"id": "base", "parent": None, "max_model_len": 512},
    guide_card("helpful", "genarm", weight=0.5),
    guide_card("harmless", "proxy", version="2", takes_weight=False),
    guide_card("best", "best_of_n", stage="selection", takes_weight=False),
    guide_card("fixer", "aligner", stage="revision", takes_weight=False),
]


class FakeAPI:
    """What the server does next, as fields that a test sets, and what it was asked."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.scored: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.key: str | None = None
        self.refusals: list[Response] = []
        self.pieces = [(" " * (at > 0) + word,) * 2 for at, word in enumerate(WORDS)]
        """The tokens of every answer: each one's own string, and the text that comes with it."""
        self.hold_at: int | None = None
        """The token before which every stream waits, until this is another one."""
        self.error_at: int | None = None
        self.cut_at: int | None = None
        self.num_disconnected = 0

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(playground_routes())

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            return self._refusal(request) or JSONResponse({"object": "list", "data": CARDS})

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            body = await request.json()
            self.bodies.append(body)
            if (refusal := self._refusal(request)) is not None:
                return refusal
            return StreamingResponse(self._stream(body), media_type="text/event-stream")

        @app.post("/v1/score")
        async def score(request: Request) -> Response:
            self.scored.append(await request.json())
            return JSONResponse({"data": [{"index": 0, "reward": 1.25}]})

        return app

    def _refusal(self, request: Request) -> Response | None:
        self.keys.append(request.headers.get("authorization"))
        if self.key is not None and self.keys[-1] != f"Bearer {self.key}":
            return error(401, "Incorrect API key provided.", code="invalid_api_key")
        if request.method == "POST" and self.refusals:
            return self.refusals.pop(0)
        return None

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        try:
            async for event in self._events(body):
                yield event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n"
        except asyncio.CancelledError:
            self.num_disconnected += 1
            raise

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[Any]:
        weights = {guide["name"]: guide.get("weight") for guide in body["guides"]}
        yield ": working\n\n"
        yield chunk({"role": "assistant", "content": ""})
        start = len(body.get("completed_token_ids", []))
        tokens = list(steered([token for token, _ in self.pieces], weights))
        revised = "fixer" in weights
        for at in range(start, len(tokens)):
            while at == self.hold_at:
                await asyncio.sleep(0.01)
            if at == self.error_at:
                yield {"error": {"message": "The model server failed.", "type": "server_error"}}
                yield "data: [DONE]\n\n"
                return
            if at == self.cut_at:
                return
            last = at == len(tokens) - 1
            piece = chunk({"content": self.pieces[at][1]}, "stop" if last else None)
            # What is known of tokens is known of those of the draft, which come at the end.
            piece["choices"][0]["steering"] = [] if revised else [tokens[at]]
            if last:
                piece["guides"] = [echo(name, weight) for name, weight in weights.items()]
                if revised:
                    draft = [name.replace("two", "many") for name, _ in self.pieces]
                    piece["choices"][0]["steering"] = list(steered(draft, weights))
                    piece["choices"][0]["draft_text"] = "".join(draft)
            yield piece
        yield "data: [DONE]\n\n"


def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def echo(name: str, weight: float | None) -> dict[str, Any]:
    return {"name": name, "weight": weight, "version": "7", "mean_kl": 0.1}


def error(status: int, message: str, **fields: Any) -> Response:
    headers = {"Retry-After": str(fields.pop("retry_after"))} if "retry_after" in fields else None
    return JSONResponse({"error": {"message": message, **fields}}, status, headers)


def steered(tokens: list[str], weights: dict[str, float | None]) -> Iterator[dict[str, Any]]:
    """What is told of the tokens of an answer, moved by the weight of `helpful`."""
    weight = weights.get("helpful") or 0.0
    for at, token in enumerate(tokens):
        base_logprob = math.log(0.02 if MOVES[at % len(MOVES)] > 0 else 0.9)
        moved = weight * MOVES[at % len(MOVES)]
        others = [
            {
                "token_id": i,
                "token": f" {name}",
                "logprob": math.log(p),
                "base_logprob": math.log(q),
            }
            for i, name, p, q in ((900, "corn", 0.2, 0.5), (901, "beans", 0.1, 0.05))
        ]
        yield {
            "token_id": at,
            "token": token,
            "logprob": min(base_logprob + moved, 0.0),
            "base_logprob": base_logprob,
            "kl": abs(moved) / 4,
            "moved_by": "helpful" if moved else None,
            "drafted": False,
            "notes": {"harmless.expected_rejects": 3.0} if "harmless" in weights else {},
            "top": others,
        }
