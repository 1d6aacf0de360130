"""Query expansion in the shape that other frameworks expect, one file each; each needs its own extra."""

from qe_edge.arguments import check_kind
from qe_edge.runtime.expander import Expander


def check_expander(expander: object) -> None:
    """Refuse a model's path, say: here it is the caller who loads a model, and several steps may share it."""
    check_kind("expander", expander, Expander, 'an Expander, such as Expander.load("student-Q4_K_M.gguf")')
