"""`Metrics`: numbers for Prometheus. Engines are read when they are asked for; requests are noted as they end.

Names and meanings are vLLM's where it has them, with `llama_` in front. Every label takes values of a fixed set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import llama
from api.http.request_log import RequestLog
from api.models import ServedModel

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)
# Name, meaning, and how it is read from an engine's numbers.
GAUGES: tuple[tuple[str, str, Callable[[llama.EngineStats], float]], ...] = (
    ("num_requests_running", "Sequences being computed", lambda s: s.running),
    ("num_requests_waiting", "Sequences waiting for their first step", lambda s: s.waiting),
    ("kv_cache_usage_perc", "Share of the cache's blocks in use, 0 to 1", lambda s: 1 - s.blocks_free / s.blocks),
    ("slots_in_use", "Requests in flight", lambda s: s.slots_in_use),
    ("slots_limit", "Requests that may be in flight", lambda s: s.slots),
    ("step_heartbeat_age_seconds", "Since the engine thread last moved", lambda s: s.heartbeat_age),
)
COUNTERS: tuple[tuple[str, str, Callable[[llama.EngineStats], float]], ...] = (
    ("prompt_tokens", "Prompt tokens computed", lambda s: s.prompt_tokens),
    ("generation_tokens", "Tokens generated", lambda s: s.generated_tokens),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", lambda s: s.prefix_queries),
    ("prefix_cache_hits", "Prompt tokens found there", lambda s: s.prefix_hits),
    ("num_preemptions", "Times that a sequence was sent back to wait", lambda s: s.preemptions),
    ("steps", "Steps of the engine", lambda s: s.steps),
)


class Metrics:
    """The numbers of one server, in a registry of their own."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._engines = _Engines()
        registry.register(self._engines)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"llama_{name}", what, labels, registry=registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"llama_{name}", what, buckets=buckets, registry=registry)

        self._rejections = counter("admission_rejections", "Requests that found no slot", "reason")
        self._requests = counter("requests", "Requests that were answered, or given up", "endpoint", "outcome")
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

    def finished(self, log: RequestLog) -> None:
        """An HTTP request is over."""
        self._requests.labels(log.endpoint, log.outcome).inc()
        stats = log.stats
        if stats is None:
            return
        self._whole.observe(log.seconds)
        if stats.first_scheduled is not None:
            self._queue.observe(stats.first_scheduled - stats.submitted)
        if stats.first_token is not None:
            self._first.observe(stats.first_token - log.started)
        self._prompt.observe(log.prompt_tokens or 0)
        self._generated.observe(log.completion_tokens or 0)

    def render(self, models: Iterable[ServedModel]) -> bytes:
        """Everything, in Prometheus' text format."""
        self._engines.models = list(models)
        return generate_latest(self._registry)


class _Engines(Collector):
    """The engines' own numbers, read at the time of the question."""

    def __init__(self) -> None:
        self.models: list[ServedModel] = []

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        snapshots = [(model.name, model.engine.stats()) for model in self.models]
        for kind, table in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, what, read in table:
                family = kind(f"llama_{name}", what, labels=["model_name"])
                for model_name, stats in snapshots:
                    family.add_metric([model_name], read(stats))
                yield family
        info = GaugeMetricFamily("llama_build_info", "Always 1", labels=["version", "fingerprint", "model_name"])
        for model in self.models:
            info.add_metric([llama.__version__, model.fingerprint, model.name], 1)
        yield info
