"""The diagrams of an evaluation: NLL along the text, NLL against bytes, and passkeys by distance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plotting import new_figure, save_figure


MARKERS = "osD^v<>PX*"


def draw(figures: Sequence[Mapping[str, Any]], measurements: Mapping[str, Any], window: int, path: Path) -> None:
    """Draws what was measured; writes nothing where there is nothing to draw.

    Args:
        figures: of `evaluation_report.summarise`. measurements: what they were made from.
    """
    panels = []
    if any("nll" in row for row in figures):
        panels.append(lambda axes: _along_the_text(axes, figures, measurements, window))
    if any("beyond W" in row.get("nll", ()) and "cache_bytes" in row for row in figures):
        panels.append(lambda axes: _against_bytes(axes, figures))
    if any("passkey" in row for row in figures):
        panels.append(lambda axes: _passkeys(axes, figures, measurements, window))
    if not panels:
        return
    figure = new_figure(5.2 * len(panels), 4.6)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        panel(axes)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8)
    save_figure(figure, path)


def _style(index: int) -> dict[str, Any]:
    return {"color": f"C{index}", "marker": MARKERS[index % len(MARKERS)], "markersize": 3.5, "linewidth": 1.2}


def _along_the_text(axes: Any, figures: Sequence[Mapping[str, Any]], measured: Mapping[str, Any], window: int) -> None:
    for index, row in enumerate(figures):
        curves = measured[row["model"]]["reading"]["curve"]
        places = [point[0] for point in curves[0]]
        means = [sum(curve[i][1] for curve in curves) / len(curves) for i in range(len(places))]
        axes.plot(places, means, label=row["model"], **_style(index))
    axes.set_xscale("log", base=2)
    axes.axvline(window, color="gray", linestyle=":", linewidth=1)
    axes.text(window, axes.get_ylim()[1], " W", va="top", fontsize=8, color="gray")
    axes.set_xlabel("tokens read before", fontsize=8)
    axes.set_title("NLL along the text, nats (mean over texts)", fontsize=9)


def _against_bytes(axes: Any, figures: Sequence[Mapping[str, Any]]) -> None:
    for index, row in enumerate(figures):
        mean, error = row["nll"]["beyond W"]
        axes.errorbar(row["cache_bytes"] / 1e6, mean, yerr=error, label=row["model"], capsize=2, **_style(index))
    axes.set_xlabel(f"bytes of the memory after {figures[0]['tokens']:,} tokens, MB", fontsize=8)
    axes.set_title("NLL beyond W against memory (lower left is better)", fontsize=9)


def _passkeys(axes: Any, figures: Sequence[Mapping[str, Any]], measurements: Mapping[str, Any], window: int) -> None:
    for index, row in enumerate(figures):
        by_place: dict[int, list[float]] = {}
        for prompt in measurements[row["model"]]["passkey"]["prompts"]:
            by_place.setdefault(prompt["distance"], []).append(prompt["nll"])
        places = sorted(by_place)
        axes.plot(places, [sum(by_place[p]) / len(by_place[p]) for p in places], label=row["model"], **_style(index))
    axes.axvline(window, color="gray", linestyle=":", linewidth=1)
    axes.set_xscale("symlog", base=2, linthresh=16)
    axes.set_xlabel("tokens between the needle and the question's end", fontsize=8)
    axes.set_title("NLL of the key's digits, nats", fontsize=9)
