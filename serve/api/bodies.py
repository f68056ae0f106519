"""JSON as it is defined: what Python's parser takes beyond that is refused."""

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class StrictRoute(APIRoute):
    """A route whose body must be JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        return read_json(await self.body())


def read_json(body: bytes) -> Any:
    """Return the value of a body.

    Raises `json.JSONDecodeError` for anything but UTF-8 with JSON in it: for NaN and infinities,
    numbers too large for a float, halves of surrogate pairs, and nesting beyond all measure.
    """
    try:
        text = body.decode()
        value = json.loads(text, parse_constant=_refuse, parse_float=_read_float)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # raises for one that is alone
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None
    except UnicodeEncodeError:
        raise json.JSONDecodeError("it holds half of a surrogate pair", "", 0) from None
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from None
    return value


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def _read_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number
