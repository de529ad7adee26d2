"""The one place that imports matplotlib, which is optional: figures without a display, saved whole or not at all."""

from pathlib import Path
from typing import Any

from .files import write_file


def require_matplotlib(wanted_by: str) -> None:
    """Refuse before the work where a diagram is wanted and matplotlib is missing (ValueError)."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{wanted_by}: draws with matplotlib, which is missing; pip install matplotlib.") from error


def new_figure(width: float, height: float) -> Any:
    """Return a figure of this size in inches, drawn without a window system."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG whole or not at all."""
    write_file(path, lambda partial: figure.savefig(partial, dpi=130, format="png"))
