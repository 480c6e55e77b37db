"""Numbers of a running server, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from uhd_jax.generation.engine import Engine

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of requests and tokens, times, and gauges that look at the engine."""

    def __init__(self, engine: Engine):
        self.registry = prometheus_client.CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = prometheus_client.Counter(
            "uhd_jax_requests", "Requests for chat completions by status; 499: the client was gone", ["status"], **own
        )
        self.broken = prometheus_client.Counter(
            "uhd_jax_streams_broken", "Streamed answers that ended in an error, by its code", ["code"], **own
        )
        self.cancelled = prometheus_client.Counter(
            "uhd_jax_requests_cancelled", "Requests whose client went away before the end of the answer", **own
        )
        self.tokens = prometheus_client.Counter("uhd_jax_tokens", "Tokens of prompts and of answers", ["kind"], **own)
        self.first = prometheus_client.Histogram(
            "uhd_jax_first_text_seconds", "From a request to the first text of its answer", buckets=_SECONDS, **own
        )
        self.seconds = prometheus_client.Histogram(
            "uhd_jax_request_seconds", "From a request to the end of its answer", buckets=_SECONDS, **own
        )
        self.registry.register(_EngineNumbers(engine))
        prometheus_client.ProcessCollector(registry=self.registry)  # memory, processor time, open files

    def text(self) -> bytes:
        """All of them in Prometheus' text form."""
        return prometheus_client.generate_latest(self.registry)


class _EngineNumbers:
    """What the engine counts itself, read when it is asked for."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        engine, cache = self._engine, self._engine.encoder.cache
        for name, text, value in (
            ("requests_waiting", "Requests that wait for a place", engine.waiting),
            ("requests_running", "Requests that are being answered", engine.running),
            ("rows", "Sequences that go on together at most", engine.shapes.rows),
            ("visual_cache_bytes", "Bytes of visual tokens that are kept", cache.bytes),
        ):
            yield GaugeMetricFamily(f"uhd_jax_{name}", text, value)
        for name, text, value in (
            ("decode_steps", "Decode steps", engine.steps),
            ("views_encoded", "Views that the tower has encoded", engine.encoder.views_encoded),
            ("visual_cache_hits", "Images whose visual tokens were still there", cache.hits),
            ("visual_cache_misses", "Images that had to be encoded", cache.misses),
        ):
            yield CounterMetricFamily(f"uhd_jax_{name}", text, value)


CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
