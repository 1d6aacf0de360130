"""Train, export and measure a small model that expands search queries on your own device.

    from qe_edge import Expander

    expander = Expander.load("student-Q4_K_M.gguf")
    print(expander.expand("what causes tides"))

What is named here is the public interface. Each name is imported when it is first used: importing this loads
no torch, transformers, mlx or llama_cpp.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qe_edge.errors import QeEdgeError
    from qe_edge.retrieval.index import Index
    from qe_edge.runtime import queries
    from qe_edge.runtime.cache import ExpansionCache
    from qe_edge.runtime.expander import Expander
    from qe_edge.runtime.expansion import ExpandedQuery
    from qe_edge.runtime.reader import Encoder, Passage
    from qe_edge.runtime.writer import Stream
    from qe_edge.student.gate import OPEN, Gate
    from qe_edge.student.join import Join
    from qe_edge.text import get_analyzer, words_of

_MODULES = {
    "Expander": "runtime.expander",
    "ExpandedQuery": "runtime.expansion",
    "Encoder": "runtime.reader",
    "Passage": "runtime.reader",
    "Stream": "runtime.writer",
    "ExpansionCache": "runtime.cache",
    "Gate": "student.gate",
    "OPEN": "student.gate",
    "Join": "student.join",
    "Index": "retrieval.index",
    "words_of": "text",
    "get_analyzer": "text",
    "QeEdgeError": "errors",
    "queries": "runtime.queries",  # a module
}
__all__ = [
    "OPEN",
    "Encoder",
    "ExpandedQuery",
    "Expander",
    "ExpansionCache",
    "Gate",
    "Index",
    "Join",
    "Passage",
    "QeEdgeError",
    "Stream",
    "get_analyzer",
    "queries",
    "words_of",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES[name]}")
    return module if name == "queries" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
