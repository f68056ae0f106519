"""Errors of the server, and how each becomes an HTTP answer in OpenAI's shape.

    PilotfishError
    ├── EngineError (RuntimeError)            a replica's decode loop died; another one can go on
    └── GuideUnavailableError (RuntimeError)  no replica of a remote guide answered
    APIError                                  an answer other than 200, ready to be sent

All cross process borders, so each is made again from its `args`.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pilotfish.errors import ConfigError, PilotfishError, PromptError

ErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class EngineError(PilotfishError, RuntimeError):
    """The decode loop of one replica died or stalled. What it was decoding is not lost."""


class GuideUnavailableError(PilotfishError, RuntimeError):
    """A remote guide answered none of the calls that were sent."""

    def __init__(self, guide: str, reason: str) -> None:
        super().__init__(guide, reason)
        self.guide = guide

    def __str__(self) -> str:
        guide, reason = self.args
        return f"guide {guide!r} does not answer: {reason}"


class APIError(Exception):
    """One error answer: status, and the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, param, code, headers)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def __str__(self) -> str:
        return self.message

    @property
    def type(self) -> ErrorType:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """What goes over the wire, as the whole body or as one event of a stream."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def cause_of(error: BaseException) -> BaseException:
    """Return what user code raised behind a Ray call, or the error itself."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def api_error(error: BaseException) -> APIError:
    """Say an error that decoding met in HTTP's words. Internals stay in the log."""
    cause = cause_of(error)
    if isinstance(cause, APIError):
        return cause
    if isinstance(cause, PromptError):
        return APIError(400, str(cause))
    if isinstance(cause, ConfigError):
        return APIError(400, str(cause), param="guides", code="invalid_guides")
    if isinstance(cause, GuideUnavailableError):
        message = f"{cause}. Try again, or set its weight to 0 to go on without it."
        return APIError(503, message, param="guides", code="guide_unavailable")
    return APIError(500, "The model server failed while it decoded. Try again.", code="internal")
