"""Distil a big model's query expansions into a small model that runs on your own device.

    from qe_edge import Expander

    expander = Expander.load("student-Q4_K_M.gguf")
    print(expander.expand("what causes tides"))

Importing this loads no torch, transformers, mlx or llama_cpp.
"""

from qe_edge.errors import QeEdgeError
from qe_edge.expander import Expander
from qe_edge.expansion import ExpandedQuery
from qe_edge.gate import Gate
from qe_edge.index import Index
from qe_edge.join import Join

__all__ = ["ExpandedQuery", "Expander", "Gate", "Index", "Join", "QeEdgeError"]
__version__ = "0.1.0"
