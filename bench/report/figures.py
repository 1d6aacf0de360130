"""How figures are written, in tables, charts and sentences."""

from __future__ import annotations

from collections.abc import Callable

from qe_edge.bench.result import System
from qe_edge.console import several
from qe_edge.retrieval.measures import Interval

MISSING = "–"
# Below this many queries, intervals are so wide that readers must be told.
FEW_QUERIES = 100
ALPHA = 0.05


def score(value: float) -> str:
    """`.485`, as the field writes effectiveness."""
    text = f"{abs(value):.3f}"
    sign = "−" if value < 0 and text != "0.000" else ""
    return sign + text.removeprefix("0")


def signed(value: float) -> str:
    """`+.051` or `−.051`."""
    text = score(value)
    return text if text.startswith("−") or text == ".000" else f"+{text}"


def percent(value: float) -> str:
    """`97 %`."""
    return f"{100 * value:.0f} %".replace("-", "−")


def rate(value: float) -> str:
    """A speed or a size: whole numbers, one decimal below ten."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def bounds(interval: Interval, write: Callable[[float], str]) -> str:
    """`[.412, .561]`; `[54, 69]` of per cent, whose unit stands beside the mean."""
    return f"[{write(interval.low)}, {write(interval.high)}]".replace(" %", "")


def with_interval(interval: Interval | None, write: Callable[[float], str]) -> str:
    """`.485 [.412, .561]`."""
    if interval is None:
        return MISSING
    return f"{write(interval.mean)} {bounds(interval, write)}"


def caveat(name: str, queries: int, *, hint: str = "") -> str:
    """How many queries a data set has, and what so few, or a model's, can't show; `hint` says where it is."""
    text = f"{several(queries, 'query', 'queries')}, 95 % bootstrap intervals."
    if queries < FEW_QUERIES:
        text += f" So few cannot tell small differences from chance{hint}."
    base, _, split = name.partition("@")
    if base.endswith("-synthetic"):
        text += (
            " They are synthetic: a model wrote them, and those stayed whose passage a search finds, so BM25 "
            "looks better here than it is."
        )
    if split.endswith("-synthetic"):
        text += " The judgments are a model's grades."
    return text


def significance(system: System) -> str:
    """A star where the difference to BM25 is significant, for a column of such differences."""
    return "*" if system.p_vs_bm25 is not None and system.p_vs_bm25 < ALPHA else ""
