"""Numbers of a running server, for Prometheus."""

from __future__ import annotations

import prometheus_client

from uhd_jax.generation.engine import Engine

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of requests and tokens, times, and gauges that look at the engine."""

    def __init__(self, engine: Engine):
        self.registry = prometheus_client.CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = prometheus_client.Counter(
            "uhd_jax_requests", "Requests for chat completions by the status they were answered with", ["status"], **own
        )
        self.cancelled = prometheus_client.Counter(
            "uhd_jax_requests_cancelled", "Requests whose client went away before the end", **own
        )
        self.tokens = prometheus_client.Counter("uhd_jax_tokens", "Tokens of prompts and of answers", ["kind"], **own)
        self.first = prometheus_client.Histogram(
            "uhd_jax_first_text_seconds", "From a request to the first text of its answer", buckets=_SECONDS, **own
        )
        self.seconds = prometheus_client.Histogram(
            "uhd_jax_request_seconds", "From a request to the end of its answer", buckets=_SECONDS, **own
        )
        cache = engine.encoder.cache
        for name, text, value in (
            ("requests_waiting", "Requests that wait for a place", lambda: engine.waiting),
            ("requests_running", "Requests that are being answered", lambda: engine.running),
            ("decode_steps", "Decode steps so far", lambda: engine.steps),
            ("views_encoded", "Views that the tower has encoded so far", lambda: engine.encoder.views_encoded),
            ("visual_cache_bytes", "Bytes of visual tokens that are kept", lambda: cache.bytes),
            ("visual_cache_hits", "Images whose visual tokens were still there", lambda: cache.hits),
            ("visual_cache_misses", "Images that had to be encoded", lambda: cache.misses),
        ):
            prometheus_client.Gauge(f"uhd_jax_{name}", text, **own).set_function(value)

    def text(self) -> bytes:
        """All of them in Prometheus' text form."""
        return prometheus_client.generate_latest(self.registry)


CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
