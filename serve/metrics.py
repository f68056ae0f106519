"""What is measured, as Ray metrics: `pilotfish_x` here is `ray_pilotfish_x` to Prometheus.

Series that vLLM has too are called what they are called there, so that dashboards can be carried
over. Serve adds the labels `application`, `deployment` and `replica`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray.serve import metrics

from serve.wire import guide_name

if TYPE_CHECKING:
    from serve.api.visit import Visit

_PREFIX = "pilotfish_"
_LABELS: Any = ("model_name", "guide", "guide_version")
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_NATS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


def _counter(name: str, description: str, *labels: str) -> metrics.Counter:
    every: Any = (*_LABELS, *labels)  # Serve annotates tuples of one
    return metrics.Counter(_PREFIX + name, description, tag_keys=every)


def _gauge(name: str, description: str) -> metrics.Gauge:
    return metrics.Gauge(_PREFIX + name, description, tag_keys=_LABELS)


def _histogram(name: str, description: str, bounds: Sequence[float]) -> metrics.Histogram:
    return metrics.Histogram(_PREFIX + name, description, list(bounds), tag_keys=_LABELS)


def _labels(model: str, guide: str = "", version: str = "") -> dict[str, str]:
    return {"model_name": model, "guide": guide, "guide_version": version}


def _add(counter: metrics.Counter, number: float, labels: dict[str, str]) -> None:
    if number > 0:  # Ray takes nothing else
        counter.inc(number, labels)


class RequestMetrics:
    """What an ingress replica counts, once per request.

    Series of requests have the guide that acted and its version as labels, nothing for the base
    alone, and `several` for a chain: clients choose chains, and must not choose how many series
    there are. Series called `guide_...` have one observation for every guide of a chain.
    """

    def __init__(self, model: str) -> None:
        """`model` is the id of the base."""
        self._model = model
        self._success = _counter("request_success", "Choices that ended.", "finished_reason")
        self._refused = _counter("requests_refused", "Answers with an error status.", "code")
        self._prompt_tokens = _counter("prompt_tokens", "Tokens of prompts.")
        self._generation_tokens = _counter("generation_tokens", "Tokens of answers.")
        self._e2e = _histogram("e2e_request_latency_seconds", "Whole requests.", _LONG)
        self._queue = _histogram("request_queue_time_seconds", "Until there was a place.", _LONG)
        self._prefill = _histogram(
            "request_prefill_time_seconds", "From the place to the first token.", _LONG
        )
        self._decode = _histogram(
            "request_decode_time_seconds", "From the first token to the end.", _LONG
        )
        self._ttft = _histogram("time_to_first_token_seconds", "To the first token.", _LONG)
        self._gap = _histogram(
            "inter_token_latency_seconds", "Between tokens, as they are sent.", _SHORT
        )
        self._per_token = _histogram(
            "request_time_per_output_token_seconds", "Mean time between tokens.", _SHORT
        )
        self._failovers = _counter("failover", "Calls made again elsewhere.", "reason")
        self._replayed = _counter("failover_replayed_tokens", "Tokens sent along with them.")
        self._kl = _histogram("guide_kl_nats", "Mean KL to the base of a request.", _NATS)
        self._accepted = _histogram("guide_accept_rate", "Candidates accepted.", _SHARES)
        self._fallbacks = _counter("guide_fallbacks", "Requests that went on without a guide.")
        self._shadows = _counter("shadow_requests", "Requests of shadow versions.", "outcome")
        self._shadow_tokens = _counter("shadow_tokens", "Tokens drawn with shadow versions.")
        self._in_flight = _gauge("ingress_choices_in_flight", "Choices being decoded.")
        self._queued = _gauge("ingress_requests_queued", "Requests that wait for a place.")

    def count(self, visit: "Visit") -> None:
        """Count a request that is over."""
        if visit.status >= 400:
            self._refused.inc(1, {**_labels(self._model), "code": str(visit.status)})
        for reason, num_tokens in visit.failovers:
            self._failovers.inc(1, {**_labels(self._model), "reason": reason})
            _add(self._replayed, num_tokens, _labels(self._model))
        for guide in visit.guides:
            self._count_guide(guide)
        acting = [guide for guide in visit.guides if guide["weight"] != 0]
        labels = _labels(self._model)
        if acting:
            name, version = acting[0]["name"], acting[0]["version"]
            one = len(acting) == 1
            labels = _labels(self._model, *((name, version) if one else ("several", "")))
        for reason in visit.finish_reasons:
            self._success.inc(1, {**labels, "finished_reason": reason})
        _add(self._prompt_tokens, visit.num_prompt_tokens, labels)
        _add(self._generation_tokens, visit.num_new_tokens, labels)
        if visit.finish_reasons:
            self._time(visit, labels)

    def count_shadow(
        self, guide: str, version: str, outcome: str, num_tokens: int, mean_kl: float
    ) -> None:
        """Count a request of a shadow version: `outcome` is ok, failed or skipped."""
        labels = _labels(self._model, guide, version)
        self._shadows.inc(1, {**labels, "outcome": outcome})
        _add(self._shadow_tokens, num_tokens, labels)
        if num_tokens:
            self._kl.observe(mean_kl, labels)

    def show(self, *, in_flight: int, queued: int) -> None:
        """Set what there is at this moment."""
        self._in_flight.set(in_flight, _labels(self._model))
        self._queued.set(queued, _labels(self._model))

    def _count_guide(self, guide: Mapping[str, Any]) -> None:
        labels = _labels(self._model, guide["name"], guide["version"])
        if guide["weight"] != 0 and "mean_kl" in guide:
            self._kl.observe(guide["mean_kl"], labels)
        if "accept_rate" in guide:
            self._accepted.observe(guide["accept_rate"], labels)
        if "gave_up_at" in guide:
            self._fallbacks.inc(1, labels)

    def _time(self, visit: "Visit", labels: dict[str, str]) -> None:
        assert visit.ended is not None, "it is over"
        self._e2e.observe(visit.ended - visit.began, labels)
        for gap in visit.gaps:
            self._gap.observe(gap, labels)
        if visit.admitted is None or visit.first is None:
            return
        self._queue.observe(visit.admitted - visit.began, labels)
        self._prefill.observe(visit.first - visit.admitted, labels)
        self._ttft.observe(visit.first - visit.began, labels)
        self._decode.observe(visit.ended - visit.first, labels)
        num_later = visit.num_new_tokens / len(visit.finish_reasons) - 1
        if num_later > 0:
            self._per_token.observe((visit.ended - visit.first) / num_later, labels)


class EngineMetrics:
    """What a replica that decodes shows about once a second."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._running = _gauge("num_requests_running", "Requests in the batch.")
        self._waiting = _gauge("num_requests_waiting", "Requests that wait for a slot.")
        self._cache = _gauge("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all.")
        self._share = _gauge("guide_share_of_step", "Share of the steps' time spent in a guide.")
        self._guide_seconds = _counter("guide_forward_seconds", "Time of steps spent in a guide.")
        self._counters = {
            "num_preempted": _counter("num_preemptions", "Requests sent back to wait."),
            "num_rounds": _counter("spec_decode_num_drafts", "Times that a sequence was drafted."),
            "num_drafted": _counter("spec_decode_num_draft_tokens", "Tokens drafted."),
            "num_accepted": _counter("spec_decode_num_accepted_tokens", "Tokens of them kept."),
        }
        self._before: Mapping[str, Any] = {}

    def show(self, stats: Mapping[str, Any]) -> None:
        """Set and count what `Decoding.stats` says, the latter since the last time."""
        before, self._before = self._before, stats
        labels = _labels(self._model)
        self._running.set(stats["num_running"], labels)
        self._waiting.set(stats["num_waiting"], labels)
        self._cache.set(stats["cache_share"], labels)
        for name, counter in self._counters.items():
            _add(counter, stats[name] - before.get(name, 0), labels)
        self._show_guides(stats, before)

    def _show_guides(self, stats: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        seconds = stats["step_seconds"] - before.get("step_seconds", 0.0)
        spent_before = before.get("guide_seconds", {})
        spent: Counter[tuple[str, str]] = Counter()
        for key, total in stats["guide_seconds"].items():
            spent[guide_name(key), _version(key)] += total - spent_before.get(key, 0.0)
        for (guide, version), now in spent.items():
            labels = _labels(self._model, guide, version)
            _add(self._guide_seconds, now, labels)
            self._share.set(now / seconds if seconds else 0.0, labels)


class GuideMetrics:
    """What `Guides` counts."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._swaps = _counter("guide_swaps", "Versions that were to be served.", "outcome")

    def count_swap(self, guide: str, version: str, outcome: str) -> None:
        """Count a version that was swapped in, or refused."""
        self._swaps.inc(1, {**_labels(self._model, guide, version), "outcome": outcome})


def _version(key: str) -> str:
    """Return the version of an engine's `name@version{args}#number`."""
    return key.partition("@")[2].partition("{")[0].partition("#")[0]
