"""What the server has done, in Prometheus' text format."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping

__all__ = ["Histogram", "Metrics"]

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Histogram:
    """Counts of values up to a few bounds."""

    def __init__(self) -> None:
        self._counts, self._sum, self._n = [0] * len(SECONDS), 0.0, 0

    def add(self, value: float) -> None:
        """Count a value.

        Args:
            value: in seconds.
        """
        self._sum, self._n = self._sum + value, self._n + 1
        for i, bound in enumerate(SECONDS):
            self._counts[i] += value <= bound

    def lines(self, name: str) -> Iterator[str]:
        """Yield its lines.

        Args:
            name: of the metric.
        """
        for bound, count in zip(SECONDS, self._counts, strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f'{name}_bucket{{le="+Inf"}} {self._n}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {self._n}"


class Metrics:
    """Counters of the server.

    Attributes:
        first: seconds to the first token of requests.
        whole: seconds that requests took.
        cached: prompt tokens that a state held already.
    """

    def __init__(self) -> None:
        self.first, self.whole, self.cached = Histogram(), Histogram(), 0
        self._requests: dict[tuple[str, int], int] = {}

    def count(self, route: str, status: int) -> None:
        """Count a request.

        Args:
            route: one of the server's.
            status: of HTTP.
        """
        key = route, status
        self._requests[key] = self._requests.get(key, 0) + 1

    def text(self, counters: Mapping[str, int], gauges: Mapping[str, int]) -> str:
        """Return all metrics.

        Args:
            counters: others, by name.
            gauges: likewise.
        """
        lines = ["# TYPE longscan_requests_total counter"]
        for (route, status), n in sorted(self._requests.items()):
            lines.append(f'longscan_requests_total{{route="{route}",status="{status}"}} {n}')
        for name, value in {**counters, "cached_tokens": self.cached}.items():
            lines += [f"# TYPE longscan_{name}_total counter", f"longscan_{name}_total {value}"]
        for name, value in {**gauges, "peak_resident_bytes": _peak()}.items():
            lines += [f"# TYPE longscan_{name} gauge", f"longscan_{name} {value}"]
        for name, histogram in (("time_to_first_token", self.first), ("request", self.whole)):
            lines += [
                f"# TYPE longscan_{name}_seconds histogram",
                *histogram.lines(f"longscan_{name}_seconds"),
            ]
        return "\n".join(lines) + "\n"


def _peak() -> int:
    """Return the peak resident set of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
