"""What a process counts. Values only: labels are backends and statuses, never content or ids."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One registry per application, so that two in one process do not share counts."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.responses = Counter(
            "responses_ingress_responses",
            "Responses that ended, by backend and final status",
            ["backend", "status"],
            registry=self._registry,
        )
        self.running = Gauge(
            "responses_ingress_running", "Responses being produced by this process", registry=self._registry
        )
        self.seconds = Histogram(
            "responses_ingress_response_seconds",
            "How long responses took from request to end",
            ["backend"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.usage_missing = Counter(
            "responses_ingress_usage_missing",
            "Responses whose backend gave no token usage",
            ["backend"],
            registry=self._registry,
        )

        self._children: dict[tuple[str, str], tuple[Counter, Histogram]] = {}

    def count(self, backend: str, status: str, seconds: float) -> None:
        """A response has ended."""
        children = self._children.get((backend, status))
        if children is None:  # looking a labelled child up costs more than counting
            children = self.responses.labels(backend, status), self.seconds.labels(backend)
            self._children[backend, status] = children
        children[0].inc()
        children[1].observe(seconds)

    def expose(self) -> bytes:
        """The registry in Prometheus's text format."""
        return generate_latest(self._registry)
