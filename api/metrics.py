"""`Metrics`: numbers for Prometheus. What engines count is read when it is asked for; requests are noted as they end.

Names and meanings are vLLM's where it has them, with `llama_` in front. Every label takes values of a fixed set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.served import Served
from api.visit import Visit

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)
try:
    VERSION = version("llama-slots")
except PackageNotFoundError:
    VERSION = "unknown"


class Metrics:
    """The numbers of one server, in a registry of their own."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._engines = _Engines()
        registry.register(self._engines)
        self._rejections = Counter(
            "llama_admission_rejections", "Requests that found no slot", ["reason"], registry=registry
        )
        self._requests = Counter(
            "llama_requests", "Requests that were answered, or given up", ["endpoint", "outcome"], registry=registry
        )

        def histogram(name: str, what: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"llama_{name}", what, buckets=buckets, registry=registry)

        self._first = histogram("time_to_first_token_seconds", "From the request's arrival to its first token")
        self._gap = histogram("inter_token_latency_seconds", "Between two events of a stream")
        self._whole = histogram("e2e_request_latency_seconds", "From the request's arrival to the end of its answer")
        self._queue = histogram("request_queue_time_seconds", "From submission to the first step")
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a request", TOKENS)
        self._generated = histogram("request_generation_tokens", "Generated tokens of a request", TOKENS)
        self.gap = self._gap.observe

    def refused(self, reason: str) -> None:
        """A request found no slot: none of its key's ("key"), or none at all ("slots")."""
        self._rejections.labels(reason).inc()

    def finished(self, visit: Visit) -> None:
        """An HTTP request is over."""
        self._requests.labels(visit.endpoint, visit.outcome).inc()
        stats = visit.stats
        if stats is None:
            return
        self._whole.observe(visit.seconds)
        if stats.first_scheduled is not None:
            self._queue.observe(stats.first_scheduled - stats.submitted)
        if stats.first_token is not None:
            self._first.observe(stats.first_token - visit.started)
        self._prompt.observe(visit.prompt_tokens or 0)
        self._generated.observe(visit.completion_tokens or 0)

    def render(self, served: Iterable[Served]) -> bytes:
        """Everything, in Prometheus' text format."""
        self._engines.served = list(served)
        return generate_latest(self._registry)


class _Engines(Collector):
    """The engines' own numbers, read at the time of the question."""

    def __init__(self) -> None:
        self.served: list[Served] = []

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        snapshots = [(one.name, one.engine.stats()) for one in self.served]
        gauges = {
            "num_requests_running": ("Sequences being computed", lambda s: s.running),
            "num_requests_waiting": ("Sequences waiting for their first step", lambda s: s.waiting),
            "kv_cache_usage_perc": (
                "Share of the cache's blocks in use, 0 to 1",
                lambda s: 1 - s.blocks_free / s.blocks,
            ),
            "slots_in_use": ("Requests in flight", lambda s: s.slots_in_use),
            "slots_limit": ("Requests that may be in flight", lambda s: s.slots),
            "step_heartbeat_age_seconds": ("Since the engine thread last moved", lambda s: s.heartbeat_age),
        }
        counters = {
            "prompt_tokens": ("Prompt tokens computed", lambda s: s.prompt_tokens),
            "generation_tokens": ("Tokens generated", lambda s: s.generated_tokens),
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache", lambda s: s.prefix_queries),
            "prefix_cache_hits": ("Prompt tokens found there", lambda s: s.prefix_hits),
            "num_preemptions": ("Times that a sequence was sent back to wait", lambda s: s.preemptions),
            "steps": ("Steps of the engine", lambda s: s.steps),
        }
        for kind, table in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (what, read) in table.items():
                family = kind(f"llama_{name}", what, labels=["model_name"])
                for model, stats in snapshots:
                    family.add_metric([model], read(stats))
                yield family
        info = GaugeMetricFamily("llama_build_info", "Always 1", labels=["version", "fingerprint", "model_name"])
        for one in self.served:
            info.add_metric([VERSION, one.fingerprint, one.name], 1)
        yield info
