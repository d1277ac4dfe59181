"""What Prometheus reads: vLLM's names and suffixes under our own prefix, so that its dashboards need one word changed.

observe(...) at the end of every request  -->  histograms, counters
Engine.stats() when somebody looks        -->  gauges, counters          --> text format 0.0.4
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llavakit.serve.protocol import Stats

PREFIX = "llava:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
_HISTOGRAMS: Mapping[str, tuple[tuple[float, ...], str]] = {
    "time_to_first_token_seconds": (_SECONDS, "From the request's arrival to its first words."),
    "inter_token_latency_seconds": (_TOKEN_SECONDS, "Between one piece of a reply and the next, for each token."),
    "e2e_request_latency_seconds": (_SECONDS, "From the request's arrival to its end."),
    "request_prompt_tokens": (_TOKENS, "Tokens of a prompt, pictures included."),
    "request_generation_tokens": (_TOKENS, "Tokens of a reply."),
}
# name, kind, what it says, how it is read off an engine
_OF_ENGINE = (
    ("num_requests_running", "gauge", "Requests that are being computed.", lambda s: s.running),
    ("num_requests_waiting", "gauge", "Requests in the queue.", lambda s: s.waiting),
    ("kv_cache_usage_perc", "gauge", "Part of the memory for keys and values in use, 0 to 1.", lambda s: _share(s.kv_bytes, s.kv_limit)),
    ("mm_cache_usage_perc", "gauge", "Part of the memory for picture features in use, 0 to 1.",
     lambda s: _share(s.feature_bytes, s.feature_limit)),
    ("prompt_tokens_total", "counter", "Tokens of prompts.", lambda s: s.prompt_tokens),
    ("prompt_tokens_cached_total", "counter", "Tokens of prompts that were in memory.", lambda s: s.cached_tokens),
    ("generation_tokens_total", "counter", "Tokens of replies.", lambda s: s.reply_tokens),
    ("prefix_cache_queries_total", "counter", "Tokens looked for in memory.", lambda s: s.prompt_tokens),
    ("prefix_cache_hits_total", "counter", "Tokens found there.", lambda s: s.cached_tokens),
    ("mm_cache_queries_total", "counter", "Pictures looked for among known features.", lambda s: s.feature_hits + s.feature_misses),
    ("mm_cache_hits_total", "counter", "Pictures found there.", lambda s: s.feature_hits),
    ("admission_rejections_total", "counter", "Requests turned away because the queue was full.", lambda s: s.refused),
    ("num_requests_aborted_total", "counter", "Requests given up by those who asked.", lambda s: s.cancelled),
    ("engine_steps_total", "counter", "Steps of the running batch.", lambda s: s.steps),
)  # fmt: skip


@dataclass
class _Histogram:
    edges: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.edges) + 1)

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.edges, value)] += times
        self.total += value * times


class Metrics:
    """Counted in the event loop's thread only."""

    def __init__(self) -> None:
        self._histograms: dict[tuple[str, str], _Histogram] = {}
        self._finished: Counter[tuple[str, str]] = Counter()
        self._responses: Counter[tuple[str, int]] = Counter()

    def observe(self, name: str, model: str, value: float, times: int = 1) -> None:
        key = name, model
        if key not in self._histograms:
            self._histograms[key] = _Histogram(_HISTOGRAMS[name][0])
        self._histograms[key].add(value, times)

    def finished(self, model: str, reason: str) -> None:
        self._finished[model, reason] += 1

    def responded(self, path: str, status: int) -> None:
        self._responses[path, status] += 1

    def text(self, engines: Mapping[str, Stats]) -> str:
        return "\n".join((*self._of_engines(engines), *self._of_requests(), ""))

    def _of_engines(self, engines: Mapping[str, Stats]) -> Iterator[str]:
        for name, kind, said, read in _OF_ENGINE:
            yield from _head(name, kind, said)
            yield from (f"{PREFIX}{name}{_labels(model_name=model)} {_number(read(stats))}" for model, stats in engines.items())

    def _of_requests(self) -> Iterator[str]:
        yield from _head("request_success_total", "counter", "Replies that came to their end, and to which.")
        for (model, reason), count in self._finished.items():
            yield f"{PREFIX}request_success_total{_labels(model_name=model, finished_reason=reason)} {count}"
        yield from _head("http_responses_total", "counter", "Answers by route and status.")
        for (path, status), count in self._responses.items():
            yield f"{PREFIX}http_responses_total{_labels(path=path, status=str(status))} {count}"
        for name, (edges, said) in _HISTOGRAMS.items():
            yield from _head(name, "histogram", said)
            for (kind, model), found in self._histograms.items():
                if kind != name:
                    continue
                below = 0
                for edge, count in zip((*(str(edge) for edge in edges), "+Inf"), found.counts, strict=True):
                    below += count
                    yield f"{PREFIX}{name}_bucket{_labels(model_name=model, le=edge)} {below}"
                yield f"{PREFIX}{name}_sum{_labels(model_name=model)} {_number(found.total)}"
                yield f"{PREFIX}{name}_count{_labels(model_name=model)} {below}"


def _head(name: str, kind: str, said: str) -> tuple[str, str]:
    return f"# HELP {PREFIX}{name} {said}", f"# TYPE {PREFIX}{name} {kind}"


def _labels(**labels: str) -> str:
    return "{" + ",".join(f'{name}="{_quoted(value)}"' for name, value in labels.items()) + "}"


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _number(value: float) -> str:
    return repr(round(value, 9) if isinstance(value, float) else value)
