"""Which replica a request goes to: not one that failed a moment ago.

A replica that hangs, or whose decode loop died, looks idle to Serve's router until it is replaced.
The ingress notices much sooner: a stream of its own stalls or breaks. Router and ingress share a
process, so that what one stream has found out keeps the others away.
"""

from typing import Any

from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from serve.suspicions import is_trusted, note_routed

ROUTER = "serve.routing.AvoidingRouter"


class AvoidingRouter(PowerOfTwoChoicesRequestRouter):
    """The less busy of two replicas, neither of which is under suspicion if there are others."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        trusted = [[r for r in rank if is_trusted(r.replica_id.unique_id)] for rank in ranks]
        if any(trusted):
            return trusted
        others = [r for r in candidate_replicas if is_trusted(r.replica_id.unique_id)]
        return [others[:2]] if others else ranks

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        asked: Any = pending_request.args[0] if pending_request.args else None
        if isinstance(asked, dict) and "attempt" in asked:
            note_routed(asked["attempt"], replica_id.unique_id)
