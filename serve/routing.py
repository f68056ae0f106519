"""Which replica a request goes to: not one that was silent a moment ago.

A process that hangs raises nothing, and looks idle to Serve's router until health checks have given
it up. The ingress notices much sooner: a stream of its own stalls. Router and ingress share a
process, so that what one stream has found out keeps the others away.
"""

import time
from collections import OrderedDict
from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RunningReplica

ROUTER = "serve.routing.AvoidingRouter"
_AVOID_S = 60.0
"""Longer than health checks take to replace a replica that hangs."""
_NUM_KEPT = 4096

_routed: OrderedDict[str, str] = OrderedDict()
"""Replica by attempt, the latest last."""
_silent_since: dict[str, float] = {}


class AvoidingRouter(PowerOfTwoChoicesRequestRouter):
    """The less busy of two replicas, neither of which is suspected to hang if there are others."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        if not _silent_since:
            return ranks
        trusted = [[one for one in rank if _is_trusted(one.replica_id)] for rank in ranks]
        if any(trusted):
            return trusted
        others = [one for one in candidate_replicas if _is_trusted(one.replica_id)]
        return [others[:2]] if others else ranks

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        asked: Any = pending_request.args[0] if pending_request.args else None
        if isinstance(asked, dict) and "attempt" in asked:
            _routed[asked["attempt"]] = replica_id.unique_id
            while len(_routed) > _NUM_KEPT:
                _routed.popitem(last=False)


def suspect(attempt: str) -> None:
    """Avoid for a while the replica to which an attempt went, whose stream has stalled."""
    replica = _routed.get(attempt)
    if replica is not None:
        _silent_since[replica] = time.monotonic()


def _is_trusted(replica_id: ReplicaID) -> bool:
    since = _silent_since.get(replica_id.unique_id)
    if since is not None and time.monotonic() - since > _AVOID_S:
        _silent_since.pop(replica_id.unique_id, None)
        return True
    return since is None
