"""Diagrams of a B'MOJO memory: innovation over a text, how long each token is visible, bytes against context.

Figures are matplotlib's. They are returned, not shown: a notebook shows the last value of a cell, a script saves it
with `figure.savefig(...)`. Colours follow the style in use, light or dark.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..cache_bmojo import BMojoCache
from ..configuration_bmojo import BMojoConfig
from ..memory_ops import NEVER
from .pieces import token_pieces, visible
from .trace import InnovationTrace, held_tokens, measure_bytes, memory_bytes, place_of, remembering_layers


# Blue for the window, orange for what is kept, grey for the rest; on light and on dark grounds.
INKS = {
    False: {"window": "#1f6fb4", "kept": "#c25e00", "other": "#5f6873"},
    True: {"window": "#6cb2f0", "kept": "#ffb547", "other": "#a4adb7"},
}
FLOOR = 1e-9  # innovations below it are drawn as if they were 0


def _missing(error: ImportError) -> ImportError:
    return ImportError(f"the diagrams need matplotlib ({error}): pip install 'modeling-bmojo[notebooks]'.")


def _axes(ax: Any, size: tuple[float, float]) -> tuple[Any, dict[str, str]]:
    """Return the axes to draw on, new ones unless given, and the inks that fit their ground.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.colors import to_rgb
    except ImportError as error:
        raise _missing(error) from error
    if ax is None:
        figure, ax = plt.subplots(figsize=size, layout="constrained")
        plt.close(figure)  # or a notebook would show it twice: once by itself, once as the cell's value
    ground = ax.get_facecolor() if ax.get_facecolor()[3] else ax.figure.get_facecolor()
    dark = sum(to_rgb(ground)) < 1.5
    ax.spines[["top", "right"]].set_visible(False)
    return ax, INKS[dark]


def plot_innovation(
    source: InnovationTrace | BMojoCache,
    *,
    layer: int | None = None,
    row: int = 0,
    tokenizer: Any = None,
    input_ids: Sequence[int] | torch.Tensor | None = None,
    labels: int = 8,
    ax: Any = None,
) -> Any:
    """Innovation along a text, and which tokens were kept.

    Args:
        source: what `trace_innovation` returned, which has every token; or a cache, which has those that it holds.
        layer: one layer; None: the mean over the layers, with the range of the middle half of them.
        row: row of the batch. labels: how many kept tokens are named, if tokenizer and input_ids are given.
        tokenizer, input_ids: to name tokens; the row's real tokens `[T]`, without pads.
        ax: matplotlib axes to draw on; None: new ones.

    Returns:
        the matplotlib figure.

    Raises:
        ImportError: without matplotlib. ValueError: for a layer without innovations, a row that does not exist, or an
            empty cache.
    """
    cache = source.cache if isinstance(source, InnovationTrace) else source
    if cache.seen is None:
        raise ValueError("source: the cache is empty; let a model read with cache=cache first.")
    if not -len(cache.seen) <= row < len(cache.seen):
        raise ValueError(f"row={row}: the cache has {len(cache.seen)} rows; rows count from 0.")
    layers = remembering_layers(cache)
    layers = layers if layer is None else [layers[place_of(layers, layer)]]
    ax, inks = _axes(ax, (9.0, 3.4))
    seen, window = int(cache.seen[row]), cache.specs[layers[0]].window
    values = _by_position(source, layers, row, seen)
    mean = values.nanmean(0)
    if not isinstance(source, InnovationTrace):
        ax.vlines(torch.arange(seen), FLOOR, mean, color=inks["other"], linewidth=0.8)
    else:
        if len(layers) > 1:
            low, high = (values.nanquantile(q, dim=0) for q in (0.25, 0.75))
            ax.fill_between(torch.arange(seen), low, high, color=inks["other"], alpha=0.3, linewidth=0)
        ax.plot(mean, color=inks["other"], linewidth=0.9)
    counts = _kept_counts(cache, layers, row)
    top, bottom = _log_range(mean)
    _draw_kept(ax, inks, counts, mean, len(layers))
    ax.axvspan(max(seen - window, 0), seen, color=inks["window"], alpha=0.15, linewidth=0)
    ax.text(seen, top, "window ", color=inks["window"], ha="right", va="top")
    if tokenizer is not None and input_ids is not None:
        _name_tokens(ax, tokenizer, torch.as_tensor(input_ids).flatten().tolist(), counts, mean, labels)
    # Surprise spans decades: the first tokens, which nothing could predict, stand at 1.
    ax.set(
        xlabel="position of the token", ylabel="innovation", xlim=(-0.01 * seen, seen), ylim=(bottom, top), yscale="log"
    )
    what = f"layer {layers[0]}" if layer is not None else f"mean over {len(layers)} layers"
    if not isinstance(source, InnovationTrace):
        what = f"{what.replace('layers', 'layers, those that hold the token')}: what the cache holds"
    ax.set_title(f"Innovation, {what}", loc="left", fontsize="medium")
    return ax.figure


def _log_range(values: torch.Tensor) -> tuple[float, float]:
    """Top and bottom of a logarithmic axis for innovations, with room for names above."""
    shown = values[values.isfinite() & (values > FLOOR)]
    if not len(shown):
        return 1.0, 0.1
    return 4 * float(shown.max()), min(0.7 * float(shown.quantile(0.01)), 0.1 * float(shown.max()))


def _by_position(source: InnovationTrace | BMojoCache, layers: list[int], row: int, seen: int) -> torch.Tensor:
    """Return innovations `[layers, seen]`, NaN where a cache has none."""
    if isinstance(source, InnovationTrace):
        return source.innovations[[source.layers.index(layer) for layer in layers], row, :seen]
    values = torch.full((len(layers), seen), torch.nan, dtype=torch.float64)
    for index, layer in enumerate(layers):
        positions, innovations = held_tokens(source, layer, row)
        values[index, positions] = innovations
    return values


def _kept_counts(cache: BMojoCache, layers: list[int], row: int) -> dict[int, int]:
    """How many layers keep each token beyond the window."""
    counts: dict[int, int] = {}
    for layer in layers:
        for token in cache.remembered(layer, row):
            counts[token.position] = counts.get(token.position, 0) + 1
    return dict(sorted(counts.items()))


def _draw_kept(ax: Any, inks: dict[str, str], counts: dict[int, int], heights: torch.Tensor, layers: int) -> None:
    """Draw dots on the kept tokens, as large as the share of layers that keep them."""
    if not counts:
        return
    positions = list(counts)
    sizes = [12 + 60 * counts[position] / layers for position in positions]
    label = "kept word for word" if layers == 1 else "kept (larger: by more layers)"
    ax.scatter(positions, heights[positions], s=sizes, color=inks["kept"], alpha=0.85, label=label, zorder=3)
    ax.legend(loc="upper center", frameon=False)


def _drawable(text: str) -> str:
    """Text with the characters that the font in use does not have as U+ numbers."""
    try:
        from matplotlib.font_manager import FontProperties, findfont, get_font
    except ImportError as error:
        raise _missing(error) from error
    font = get_font(findfont(FontProperties()))
    return "".join(sign if font.get_char_index(ord(sign)) else f"U+{ord(sign):04X}" for sign in text)


def _name_tokens(
    ax: Any, tokenizer: Any, ids: list[int], counts: dict[int, int], heights: torch.Tensor, n: int
) -> None:
    """Name the kept the kept tokens that stand out most, at most one in each of n stretches of the text."""
    pieces = {p.first + offset: p for p in token_pieces(tokenizer, ids) for offset in range(p.count)}
    stretch = max(len(heights) / max(n, 1), 1)
    best: dict[int, int] = {}
    for position in counts:
        place = int(position / stretch)
        if place not in best or heights[position] > heights[best[place]]:
            best[place] = position
    for position in list(best.values())[:n]:
        name = visible(pieces[position].text).strip() if position in pieces else ""
        ax.annotate(
            _drawable(name),
            (position, float(heights[position])),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize="small",
            parse_math=False,
        )


def plot_expiry(trace: InnovationTrace, layer: int, *, row: int = 0, ax: Any = None) -> Any:
    """Which tokens each position of a text sees in one layer: across the tokens, upwards the time.

    The band is the sliding window, columns above it are tokens that were kept, and until when.

    Args:
        trace: what `trace_innovation` returned. layer, row: which. ax: matplotlib axes; None: new ones.

    Returns:
        the matplotlib figure.

    Raises:
        ImportError: without matplotlib. ValueError: for a layer without innovations.
    """
    expiry = trace.expiry(layer, row)
    tokens, window = len(expiry), trace.cache.specs[layer].window
    ax, inks = _axes(ax, (5.6, 5.2))
    position = torch.arange(tokens)
    edge = (position + window).clamp(max=tokens)
    ax.fill_between(position, position, edge, color=inks["window"], linewidth=0)
    kept = expiry > position + window
    ends = torch.where(expiry == NEVER, tokens, expiry).clamp(max=tokens)
    ax.vlines(position[kept], edge[kept], ends[kept], color=inks["kept"], linewidth=max(0.8, 360 / tokens))
    ax.plot([], color=inks["window"], linewidth=4, label=f"in the window of {window}")
    ax.plot([], color=inks["kept"], linewidth=4, label="kept by the eidetic memory")
    ax.set(xlabel="token", ylabel="position that reads", xlim=(0, tokens), ylim=(0, tokens))
    ax.set_title(f"What each position sees, layer {layer}", loc="left", fontsize="medium")
    ax.legend(loc="lower right", frameon=False)
    return ax.figure


def plot_memory_growth(
    model_or_config: nn.Module | BMojoConfig,
    tokens: int = 32768,
    *,
    dtype: torch.dtype | None = None,
    measure: Sequence[int] | None = None,
    ax: Any = None,
) -> Any:
    """Return bytes of the memory against the length of the context: B'MOJO's and that of a Transformer of the same
    sizes.

    Args:
        model_or_config: whose sizes. tokens: right end of the axis. dtype: default: the model's, or fp32.
        measure: lengths that the model really reads (random tokens); the bytes of its cache are drawn as dots.
        ax: matplotlib axes; None: new ones.

    Returns:
        the matplotlib figure.

    Raises:
        ImportError: without matplotlib. ValueError: for no B'MOJO, `tokens` below 2, or `measure` without a model or
            not rising.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if getattr(config, "model_type", None) != "bmojo":
        name = type(model_or_config).__name__
        raise ValueError(f"model_or_config={name}: must be a B'MOJO model or BMojoConfig; pass one.")
    if tokens < 2:
        raise ValueError(f"tokens={tokens}: must be at least 2; give the longest context to draw.")
    is_model = isinstance(model_or_config, nn.Module)
    lengths = [int(length) for length in measure or []]
    if lengths and (not is_model or lengths[0] < 1 or lengths != sorted(set(lengths))):
        raise ValueError(f"measure={lengths}: needs a model to read with and rising lengths of at least 1; give both.")
    dtype = dtype or (model_or_config.dtype if is_model else torch.float32)
    ax, inks = _axes(ax, (7.0, 3.8))
    marks = sorted({max(1, tokens * step // 64) for step in range(65)})
    ours, theirs = zip(*(memory_bytes(config, mark, dtype) for mark in marks))
    scale, unit = (1e9, "GB") if max(theirs) >= 2e9 else (1e6, "MB")
    ax.plot(marks, [value / scale for value in theirs], color=inks["other"], linewidth=2)
    ax.plot(marks, [value / scale for value in ours], color=inks["kept"], linewidth=2.4)
    top = max(theirs[-1], ours[-1]) / scale
    ends = {"Transformer": (theirs[-1], inks["other"]), "B'MOJO": (ours[-1], inks["kept"])}
    for name, (value, ink) in ends.items():
        text = f" {name}\n {_short(value / scale)} {unit}"
        ax.annotate(text, (tokens, value / scale), color=ink, va="center", annotation_clip=False)
    if lengths:
        found = [value / scale for value in measure_bytes(model_or_config, lengths)]
        ax.plot(lengths, found, "o", color=inks["kept"], label="B'MOJO, measured")
        ax.legend(loc="upper left", frameon=False)
    ax.set(xlabel="context, tokens", ylabel=f"memory of one sequence, {unit}", xlim=(0, tokens), ylim=(0, 1.08 * top))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    title = f"Memory against context, {str(dtype).removeprefix('torch.')}"
    if ours[-1] < theirs[-1]:
        title += f"; B'MOJO's is the smaller one beyond {_crossing(config, tokens, dtype):,} tokens"
    ax.set_title(title, loc="left", fontsize="medium")
    return ax.figure


def _crossing(config: BMojoConfig, tokens: int, dtype: torch.dtype) -> int:
    """Return the longest context at which B'MOJO's memory is not the smaller one, below `tokens`, where it is."""
    low, high = 0, tokens
    while high - low > 1:
        middle = (low + high) // 2
        ours, theirs = memory_bytes(config, middle, dtype)
        low, high = (low, middle) if ours < theirs else (middle, high)
    return low


def _short(value: float) -> str:
    """Three digits, and all that stand before the point: 0.034, 1.51, 30.6, 1,510."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


__all__ = ["plot_expiry", "plot_innovation", "plot_memory_growth"]
