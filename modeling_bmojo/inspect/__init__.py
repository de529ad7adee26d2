"""Looking at a B'MOJO: its memory in pictures, plots and traces, and the kernels that it runs on.

Nothing here travels with a checkpoint.
"""

from .difference import Difference, first_difference
from .explain import explain_kernels
from .plots import plot_expiry, plot_innovation, plot_memory_growth
from .show import MemoryView, show_memory
from .trace import InnovationTrace, memory_bytes, trace_innovation


__all__ = [
    "Difference",
    "InnovationTrace",
    "MemoryView",
    "explain_kernels",
    "first_difference",
    "memory_bytes",
    "plot_expiry",
    "plot_innovation",
    "plot_memory_growth",
    "show_memory",
    "trace_innovation",
]
