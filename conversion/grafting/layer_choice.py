"""`layers: measured`: which layers lose least as B'MOJO layers.

    harm_i = NLL beyond the window with layer i alone as a B'MOJO layer  -  NLL of the source beyond the window

on text of its own (the training part of `texts.py`, or files), mean over sequences. The k layers of the smallest harm
are converted; of equals, the earlier ones. The harms of several layers need not add up: this ranks single swaps.

The model is loaded once, every layer built in both forms at once, since both read the same projections; a swap changes
the layer's type in place (`running.layer_as`). The ranking is saved as JSON and as a diagram.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from modeling_bmojo import BMojoConfig

from ..common.files import write_json
from ..common.nll import mean_and_error, mean_beyond
from ..common.plotting import new_figure, require_matplotlib, save_figure
from ..common.running import assembled, layer_as, set_layer_kind
from ..data.texts import fingerprint, read_texts, sequences
from .families import source_layer_types
from .settings import GraftSettings
from .sources import Source


MEASURED = "measured"
RANKING_FILE, RANKING_PLOT = "layer_ranking.json", "layer_ranking.png"
CHUNK = 512  # tokens read at a time; bounds the memory of the logits


def measure_layers(
    config: BMojoConfig, source: Source, settings: GraftSettings, build: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, Any]:
    """Return the ranking, as plain data; `chosen` are the layers to convert.

    Args:
        config: of the graft with all layers converted. build: makes the tensors of that graft, after all checks.

    Raises:
        ValueError: too many layers, no tokenizer, text that is too short or does not reach beyond the window, or no
            matplotlib for the diagram.
    """
    texts = _measured_texts(config, source, settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = build()
    if device.type == "cpu":
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    model = assembled(config, {name: tensor.to(device) for name, tensor in tensors.items()})
    nll = rank_layers(model, source_layer_types(source.config), texts)
    base = nll.pop("source")
    harm = [mean_and_error([ours - theirs for ours, theirs in zip(nll[index], base)]) for index in sorted(nll)]
    order = sorted(range(len(harm)), key=lambda index: harm[index][0])
    return {
        "window": config.window_size,
        "tokens": settings.measured_tokens,
        "texts": settings.measured_texts,
        "text_sha256": fingerprint(texts),
        "source_nll": mean_and_error(base)[0],
        "harm": [mean for mean, _ in harm],
        "standard_error": [error for _, error in harm],
        "order": order,
        "chosen": sorted(order[: settings.measured_layers]),
    }


def _measured_texts(config: BMojoConfig, source: Source, settings: GraftSettings) -> list[torch.Tensor]:
    """Return the sequences to measure on; every refusal is here."""
    count, tokens = config.num_hidden_layers, settings.measured_tokens
    require_matplotlib("layers: measured")
    if settings.measured_layers > count:
        raise ValueError(f"measured_layers={settings.measured_layers}: the source has only {count} layers.")
    if not config.window_size + 1 < tokens <= config.max_position_embeddings:
        raise ValueError(
            f"measured_tokens={tokens}: must reach beyond window_size={config.window_size} and stay within the "
            f"source's {config.max_position_embeddings} positions."
        )
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise ValueError(f"layers: measured needs text, but source {source.label!r} has no tokenizer; give a list.")
    files = settings.measured_files
    texts = read_texts(None if files else "pydoc", files, split="training")
    return sequences(tokenizer, texts, tokens, settings.measured_texts)


def rank_layers(model: torch.nn.Module, kinds: Sequence[str], texts: Sequence[torch.Tensor]) -> dict[Any, list[float]]:
    """NLL beyond the window per text: of the source (key "source") and with each layer alone as it is in `model`.

    Args:
        model: every layer a B'MOJO layer; is the source when this returns. kinds: the layers' types in the source.
    """
    for index, kind in enumerate(kinds):
        set_layer_kind(model, index, kind)
    found: dict[Any, list[float]] = {}
    total = (len(kinds) + 1) * sum(ids.shape[1] for ids in texts)
    with tqdm(total=total, desc="Measuring layers", unit="token") as bar:
        found["source"] = mean_beyond(model, texts, model.config.window_size, CHUNK, bar)
        for index in range(len(kinds)):
            with layer_as(model, index, "bmojo"):
                found[index] = mean_beyond(model, texts, model.config.window_size, CHUNK, bar)
    return found


def write_ranking(folder: Path, ranking: dict[str, Any]) -> None:
    """Write the ranking as JSON and as a bar per layer."""
    write_json(folder / RANKING_FILE, ranking)
    count = len(ranking["harm"])
    figure = new_figure(max(5.0, 0.28 * count + 1.5), 3.4)
    axes = figure.add_subplot()
    chosen = set(ranking["chosen"])
    colors = ["tab:blue" if index in chosen else "lightgray" for index in range(count)]
    errors = None if None in ranking["standard_error"] else ranking["standard_error"]
    axes.bar(range(count), ranking["harm"], yerr=errors, color=colors, ecolor="dimgray")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlabel("layer (blue: converted)")
    axes.set_ylabel("NLL beyond the window,\nabove the source's")
    title = f"{ranking['source_nll']:.3f} nats in the source; W={ranking['window']}, {ranking['tokens']:,} tokens"
    axes.set_title(f"What each layer loses as a B'MOJO layer\n{title}", fontsize=9)
    save_figure(figure, folder / RANKING_PLOT)
