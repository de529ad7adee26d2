"""Looking at a B'MOJO: its memory in pictures, plots and traces, and the kernels that it runs on.

Nothing here travels with a checkpoint.
"""

from .attribution import Attribution, Passage, attribute
from .difference import Difference, first_difference
from .explain import explain_kernels
from .passages import PassagesView, show_passages
from .plots import plot_expiry, plot_innovation, plot_memory_growth
from .show import MemoryView, show_memory
from .trace import InnovationTrace, memory_bytes, trace_innovation


__all__ = [
    "Attribution",
    "Difference",
    "InnovationTrace",
    "MemoryView",
    "Passage",
    "PassagesView",
    "attribute",
    "explain_kernels",
    "first_difference",
    "memory_bytes",
    "plot_expiry",
    "plot_innovation",
    "plot_memory_growth",
    "show_memory",
    "show_passages",
    "trace_innovation",
]
