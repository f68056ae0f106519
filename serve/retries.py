"""Which failures of a call mean: another replica can answer it."""

import grpc
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from serve.errors import EngineError, cause_of


class StreamBrokenError(Exception):
    """A stream of tokens ended early, or skipped a position."""


def is_retryable(error: BaseException) -> bool:
    """Whether the replica failed, and not the request."""
    if isinstance(cause_of(error), EngineError | StreamBrokenError | TimeoutError):
        return True
    if isinstance(error, RayTaskError):  # raised by our own code: it would be raised again
        return False
    return isinstance(error, RayError | RayServeException | grpc.RpcError)
