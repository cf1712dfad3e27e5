"""Counters for Prometheus: requests, decisions, durations, and the state of queue and audit log.

Only the verdict depends on a thinking, and the client gets the verdict anyway: there are no reasons and no sizes.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counters of one server, in a separate registry."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._responses = Counter("so8t_responses", "HTTP responses", ["status"], registry=self._registry)
        self._decisions = Counter("so8t_decisions", "Decisions on record", ["verdict"], registry=self._registry)
        self.seconds = Histogram(
            "so8t_request_seconds", "Admitted requests, until their last byte", buckets=SECONDS, registry=self._registry
        )
        for verdict in ("released", "withheld"):
            self._decisions.labels(verdict)

    def responded(self, status: int) -> None:
        """Count a response that began."""
        self._responses.labels(str(status)).inc()

    def decided(self, verdict: str) -> None:
        """Count a decision that is on disk."""
        self._decisions.labels(verdict).inc()

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read at each request for the metrics."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All counters in Prometheus' text form."""
        return generate_latest(self._registry)
