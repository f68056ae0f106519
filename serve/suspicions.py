"""Which replicas were silent a moment ago, as one ingress has found out.

Apart from the router, of whose module Serve makes a copy.
"""

import time
from collections import OrderedDict

_AVOID_S = 60.0
"""Longer than health checks take to replace a replica that hangs."""
_NUM_KEPT = 4096

_routed: OrderedDict[str, str] = OrderedDict()
"""Replica by attempt, the latest last."""
_silent_since: dict[str, float] = {}


def note_routed(attempt: str, replica: str) -> None:
    """Remember where an attempt went."""
    _routed[attempt] = replica
    while len(_routed) > _NUM_KEPT:
        _routed.popitem(last=False)


def suspect(attempt: str) -> None:
    """Avoid for a while the replica to which an attempt went, whose stream has stalled."""
    replica = _routed.get(attempt)
    if replica is not None:
        _silent_since[replica] = time.monotonic()


def is_trusted(replica: str) -> bool:
    """Whether nobody has found a replica silent lately."""
    since = _silent_since.get(replica)
    if since is not None and time.monotonic() - since > _AVOID_S:
        _silent_since.pop(replica, None)
        return True
    return since is None
