"""The diagrams of an evaluation: NLL along the text (above the source's), NLL against bytes, passkeys by distance, and
RULER's tasks by length and by depth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.plotting import new_figure, save_figure


MARKERS = "osD^v<>PX*"


def draw(figures: Sequence[Mapping[str, Any]], measurements: Mapping[str, Any], window: int, path: Path) -> None:
    """Draw what was measured; writes nothing where there is nothing to draw.

    Args:
        figures: of `report.summarise`. measurements: what they were made from.
    """
    ruled, figures = figures, [row for row in figures if row["kind"] != "press"]
    panels = []
    if any("nll" in row for row in figures):
        panels.append(lambda axes: _along_the_text(axes, figures, measurements, window))
    if any("beyond W" in row.get("nll", ()) and "cache_bytes" in row for row in figures):
        panels.append(lambda axes: _against_bytes(axes, figures))
    if any("passkey" in row for row in figures):
        panels.append(lambda axes: _passkeys(axes, figures, measurements, window))
    if any("ruler" in row for row in ruled):
        panels.append(lambda axes: _ruler_by_length(axes, ruled))
        if any(entry["task"].startswith("niah_single") for entry in ruled[0]["ruler"]):
            panels.append(lambda axes: _ruler_by_depth(axes, ruled, measurements))
    if not panels:
        return
    figure = new_figure(5.2 * len(panels), 4.6)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        panel(axes)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8)
    save_figure(figure, path)


def _style(index: int) -> dict[str, Any]:
    return {"color": f"C{index}", "marker": MARKERS[index % len(MARKERS)], "markersize": 3.5, "linewidth": 1.2}


def _along_the_text(axes: Any, figures: Sequence[Mapping[str, Any]], measured: Mapping[str, Any], window: int) -> None:
    """Above the source where it was measured: texts get easier as they go on, which says nothing about the models."""
    curves = {row["model"]: measured[row["model"]]["reading"]["curve"] for row in figures}
    base = next((curves[row["model"]] for row in figures if row["kind"] == "source"), None)
    first = window / 4 if base else 0  # inside the window there is nothing to see beside the source
    for index, row in enumerate(figures):
        texts = curves[row["model"]]
        heights = [[y - (base[i][j][1] if base else 0) for j, (_, y) in enumerate(c)] for i, c in enumerate(texts)]
        points = [(x, sum(h[j] for h in heights) / len(heights)) for j, (x, _) in enumerate(texts[0]) if x >= first]
        axes.plot(*zip(*points), label=row["model"], **_style(index))
    axes.set_xscale("log", base=2)
    axes.axvline(window, color="gray", linestyle=":", linewidth=1)
    axes.set_xlabel(f"tokens read before (dotted: W = {window:,})", fontsize=8)
    axes.set_title("NLL along the text, nats" + (" above the source" if base else ""), fontsize=9)


def _against_bytes(axes: Any, figures: Sequence[Mapping[str, Any]]) -> None:
    for index, row in enumerate(figures):
        mean, error = row["nll"]["beyond W"]
        axes.errorbar(row["cache_bytes"] / 1e6, mean, yerr=error, label=row["model"], capsize=2, **_style(index))
    axes.set_xlabel(f"bytes of the memory after {figures[0]['tokens']:,} tokens, MB", fontsize=8)
    axes.set_title("NLL beyond W against memory (lower left is better)", fontsize=9)


def _passkeys(axes: Any, figures: Sequence[Mapping[str, Any]], measured: Mapping[str, Any], window: int) -> None:
    for index, row in enumerate(figures):
        prompts = measured[row["model"]]["passkey"]["prompts"]
        points = [(prompt["distance"], prompt["nll"]) for prompt in prompts]
        axes.plot(*zip(*points), label=row["model"], **{**_style(index), "linestyle": "", "alpha": 0.7})
    axes.axvline(window, color="gray", linestyle=":", linewidth=1)
    axes.set_xscale("symlog", base=2, linthresh=16)
    axes.set_xlabel(f"tokens between needle and question's end (dotted: W = {window:,})", fontsize=8)
    axes.set_title("NLL of each key's digits, nats", fontsize=9)


def _ruler_by_length(axes: Any, figures: Sequence[Mapping[str, Any]]) -> None:
    """Mean of the tasks; bars are the mean of their intervals."""
    for index, row in enumerate(figures):
        lengths = sorted({entry["length"] for entry in row["ruler"]})
        by_length = [[entry for entry in row["ruler"] if entry["length"] == length] for length in lengths]
        mean = [_mean([entry["score"] for entry in entries]) for entries in by_length]
        below = [_mean([entry["score"] - entry["low"] for entry in entries]) for entries in by_length]
        above = [_mean([entry["high"] - entry["score"] for entry in entries]) for entries in by_length]
        axes.errorbar(lengths, mean, yerr=[below, above], label=row["model"], capsize=2, **_style(index))
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("tokens of prompt and answer", fontsize=8)
    axes.set_title("RULER's tasks, share of answers found", fontsize=9)


def _ruler_by_depth(axes: Any, figures: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> None:
    """Single needles of all lengths, in five parts of the text."""
    for index, row in enumerate(figures):
        wanted = [f"ruler {e['task']} {e['length']}" for e in row["ruler"] if e["task"].startswith("niah_single")]
        count = row["ruler"][0]["samples"]
        samples = [sample for name in wanted for sample in measured[row["model"]][name]["samples"][:count]]
        parts = [[s["score"] for s in samples if min(s["depths"][0] // 20, 4) == part] for part in range(5)]
        points = [(20 * part + 10, _mean(scores)) for part, scores in enumerate(parts) if scores]
        axes.plot(*zip(*points), label=row["model"], **_style(index))
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("depth of the needle, percent of the text", fontsize=8)
    axes.set_title("single needles found", fontsize=9)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
