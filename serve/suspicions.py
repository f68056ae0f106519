"""Which replicas failed a moment ago, as one ingress has found out.

Apart from the router, of whose module Serve makes a copy.
"""

import math
import time
from collections import OrderedDict

_AVOID_S = 60.0
"""Longer than health checks take to replace a replica that hangs."""
_NUM_KEPT = 4096

_routed: OrderedDict[str, str] = OrderedDict()
"""Replica by attempt, the latest last."""
_failed_at: dict[str, float] = {}


def note_routed(attempt: str, replica: str) -> None:
    """Remember where an attempt went."""
    _routed[attempt] = replica
    while len(_routed) > _NUM_KEPT:
        _routed.popitem(last=False)


def suspect(attempt: str) -> None:
    """Avoid for a while the replica to which an attempt went, whose stream stalled or broke."""
    for replica in [one for one in _failed_at if is_trusted(one)]:
        del _failed_at[replica]  # it may be dead, and never asked about again
    if (replica := _routed.get(attempt)) is not None:
        _failed_at[replica] = time.monotonic()


def is_trusted(replica: str) -> bool:
    """Whether no stream from a replica has failed lately."""
    return time.monotonic() - _failed_at.get(replica, -math.inf) > _AVOID_S
