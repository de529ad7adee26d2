"""The pictures of a recall run: accuracy against bytes of state, one per task; of texts the loss by position."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.plotting import new_figure, save_figure
from .report import by_position


MARKERS = "osD^v<>PX*hd"


def draw(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw one PNG per task into `folder` and return the files.

    Args:
        rows: of `report.summarise`.
    """
    files, names = [], list(dict.fromkeys(row["model"] for row in rows))
    for task in dict.fromkeys(row["task"] for row in rows):
        here = [row for row in rows if row["task"] == task]
        tests = list(dict.fromkeys(row["test"] for row in here))
        positions = by_position(tests[0])
        panels = [None] if positions else tests
        figure = new_figure(max(7.0, 5.0 * len(panels)), 4.6)
        for index, test in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), index + 1)
            if positions:
                _by_position(axes, here, names, tests)
            else:
                _against_bytes(axes, [row for row in here if row["test"] == test], names, f"{task}, {test}")
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=8)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
        files.append(folder / f"{task}.png")
        save_figure(figure, files[-1])
    return files


def _style(names: Sequence[str], row: Mapping[str, Any]) -> dict[str, Any]:
    index = names.index(row["model"])
    line = "-" if row["ranked"] else ":"
    return {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)], "markersize": 5, "linestyle": line}


def _against_bytes(axes: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str], title: str) -> None:
    for name in dict.fromkeys(row["model"] for row in rows):
        own = sorted((row for row in rows if row["model"] == name), key=lambda row: row["bytes"])
        errors = [row["accuracy"][1] or 0 for row in own]
        style = _style(names, own[0])
        axes.errorbar([row["bytes"] for row in own], [row["accuracy"][0] for row in own], errors, label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("bytes of the memory, one text (dotted: grows with the text)", fontsize=8)
    axes.set_title(f"{title}: accuracy", fontsize=9)


def _by_position(axes: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str], tests: Sequence[str]) -> None:
    for place in dict.fromkeys((row["model"], row["wanted_bytes"]) for row in rows):
        own = [row for row in rows if (row["model"], row["wanted_bytes"]) == place]
        heights = [row["loss"][0] for row in sorted(own, key=lambda row: tests.index(row["test"]))]
        axes.plot(range(len(tests)), heights, label=f"{place[0]}, {place[1]:,}", **_style(names, own[0]))
    axes.set_xticks(range(len(tests)), tests, fontsize=7)
    axes.set_xlabel("position in the text; trained up to the first", fontsize=8)
    axes.set_title("loss, nats", fontsize=9)
