"""Counts what the server does, in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    """Observations by upper bound, their number and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str = "") -> list[str]:
        """The exposition lines; `labels` such as `route="/x"`."""
        prefix = f"{labels}," if labels else ""
        braces = f"{{{labels}}}" if labels else ""
        lines, total = [], 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{{prefix}le="{bound}"}} {total}')
        return [*lines, f"{name}_sum{braces} {self._sum:.9g}", f"{name}_count{braces} {total}"]


class Metrics:
    """All that `/metrics` shows. Used on the event loop's thread alone."""

    def __init__(self, engine: str, model: str, held: Callable[[], dict[str, int]]) -> None:
        self._info = f'engine="{_escaped(engine)}",model="{_escaped(model)}"'
        self._held = held
        self._answers: Counter[tuple[str, int]] = Counter()
        self._seconds: dict[str, Histogram] = {}
        self._batches: dict[str, Histogram] = {}
        self.text_cache_hits = 0

    def answered(self, route: str, status: int, seconds: float) -> None:
        """`route` is a path that the server has, never what a client sent."""
        self._answers[route, status] += 1
        self._seconds.setdefault(route, Histogram(_SECONDS)).observe(seconds)

    def embedded(self, kind: str, count: int) -> None:
        """A batch of `count` items of `kind`, `image` or `text`, went to the engine."""
        self._batches.setdefault(kind, Histogram(_BATCH)).observe(count)

    def exposition(self) -> str:
        """The whole page."""
        lines = _head("engine_info", "gauge", "What serves")
        lines.append(f"clipserver_engine_info{{{self._info}}} 1")
        lines += _head("requests_total", "counter", "Requests answered")
        for (route, status), count in sorted(self._answers.items()):
            lines.append(f'clipserver_requests_total{{route="{route}",status="{status}"}} {count}')
        lines += _head("request_seconds", "histogram", "Time from arrival to answer")
        for route, seconds in sorted(self._seconds.items()):
            lines += seconds.lines("clipserver_request_seconds", f'route="{route}"')
        lines += _head("batch_size", "histogram", "Items that the engine got at once")
        for kind, sizes in sorted(self._batches.items()):
            lines += sizes.lines("clipserver_batch_size", f'kind="{kind}"')
        lines += _head("held", "gauge", "Items admitted and not yet answered")
        lines += [f'clipserver_held{{kind="{k}"}} {n}' for k, n in sorted(self._held().items())]
        lines += _head("text_cache_hits_total", "counter", "Texts answered from the cache")
        lines.append(f"clipserver_text_cache_hits_total {self.text_cache_hits}")
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP clipserver_{name} {text}.", f"# TYPE clipserver_{name} {kind}"]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
