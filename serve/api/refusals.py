"""Errors in OpenAI's shape, whoever raises them."""

import json

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from serve.errors import APIError


def add_error_handlers(http: FastAPI) -> None:
    """Answer every error of an application in one shape."""
    http.add_exception_handler(APIError, _send_api_error)
    http.add_exception_handler(RequestValidationError, _send_invalid)
    http.add_exception_handler(HTTPException, _send_http_error)
    http.add_exception_handler(Exception, _send_internal)


def error_response(error: APIError) -> Response:
    """Return an error as it is sent."""
    # In ASCII: what is quoted from a body need not be text that can be encoded.
    return Response(
        json.dumps(error.body()),
        status_code=error.status,
        headers=error.headers,
        media_type="application/json",
    )


async def _send_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error_response(error)


async def _send_invalid(_: Request, error: Exception) -> Response:
    """Name the field of the first thing wrong with a request."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()[0]
    where = [str(part) for part in found["loc"] if part not in ("body", "header")]
    context = found.get("ctx", {})
    if found["type"] == "json_invalid":
        return error_response(APIError(400, f"The body is not JSON: {context['error']}."))
    if not where and "param" not in context:
        message = "The body must be a JSON object, with Content-Type: application/json."
        return error_response(APIError(400, message))
    place = ".".join(where)
    if found["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {place}"
    elif "param" in context:  # said by one of our own validators, in full
        message = found["msg"]
    else:
        message = f"{place}: {found['msg']}"
    param = context.get("param") or (where[0] if where else None)
    return error_response(APIError(400, message, param=param))


async def _send_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return error_response(APIError(error.status_code, message, headers=error.headers))


async def _send_internal(_: Request, __: Exception) -> Response:
    """Starlette logs the error itself; the client learns nothing of our insides."""
    message = "The server failed to answer this request."
    return error_response(APIError(500, message, code="internal"))
