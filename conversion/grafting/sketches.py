"""The sketches of a model's stored keys, fitted to it on a little text (`common/sketch_fit.py`).

The model reads the text as it will read any, but chooses exactly: K of all stored tokens by their true scores, so that
what the upper layers see does not depend on sketches that are not fitted yet. All weights are in memory meanwhile (in
float32 on a CPU), beside them the text's keys.
"""

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modeling_bmojo import BMojoConfig

from ..common.running import assembled
from ..common.sketch_fit import fit_sketches
from ..common.weights import SKETCH
from ..data.texts import fingerprint, read_texts, token_stream


TOKENS = 2048
RULE = "fitted to keys and queries of a text"


@dataclass(frozen=True)
class FittingText:
    """The text that sketches are fitted on. rows: ids `[1, T]`. names: of the texts, for reports."""

    rows: list[torch.Tensor]
    names: list[str]

    @property
    def tokens(self) -> int:
        return sum(row.numel() for row in self.rows)


def sketch_names(names: Iterable[str]) -> list[str]:
    """Return the tensors that belong to a sketch."""
    return [name for name in names if SKETCH in name]


def read_fitting_text(
    tokenizer: PreTrainedTokenizerBase | None, config: BMojoConfig, files: list[str] | None, what: str
) -> FittingText:
    """Return TOKENS tokens, in rows that the model's positions reach.

    Args:
        files: paths or patterns; None: the part of Python's reference that may be trained on. what: the setting that
            names them, in messages.

    Raises:
        ValueError: no tokenizer, text that cannot be read, ids beyond the vocabulary, or too little text.
    """
    if tokenizer is None:
        raise ValueError(
            f"{what}={files!r}: sketches are fitted on text, but there is no tokenizer to read it with; add one to the "
            "folder, or set storage_sketch_size=null."
        )
    try:
        texts = read_texts(None if files else "pydoc", files or None, split="training")
    except (ValueError, OSError) as error:
        raise ValueError(f"{what}={files!r}: {error}") from error
    length = min(TOKENS, config.max_position_embeddings)
    count = TOKENS // length
    ids = token_stream(tokenizer, texts)
    if len(ids) < count * length:
        raise ValueError(
            f"{what}={files!r}: the text has {len(ids):,} tokens, and sketches are fitted on {count * length:,}; give "
            "more text."
        )
    ids = ids[: count * length]
    if int(ids.max()) >= config.vocab_size:
        raise ValueError(
            f"{what}={files!r}: the tokenizer gives id {int(ids.max())}, the model has vocab_size="
            f"{config.vocab_size}; check that tokenizer and model belong together."
        )
    return FittingText(list(ids.view(count, 1, length)), list(texts))


def choosing_exactly(config: BMojoConfig) -> BMojoConfig:
    """Return the config without sketches: all stored tokens are candidates."""
    exact = copy.deepcopy(config)
    exact.storage_candidates = exact.storage_sketch_size = None
    return exact


def fit(
    config: BMojoConfig, tensors: Mapping[str, torch.Tensor], text: FittingText
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the sketches' tensors by the names of a checkpoint, float32, and what a report says of them.

    Args:
        config: with storage_size > 0 and the size of the sketches. tensors: all others of the checkpoint.

    Raises:
        ValueError: see `fit_sketches`.
    """
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    model = assembled(choosing_exactly(config), {name: tensor.to(device) for name, tensor in tensors.items()})
    size = config.storage_sketch_size
    fitted = fit_sketches(model, text.rows, size)
    found = {
        f"model.layers.{index}{SKETCH}{name}": value for index, layer in fitted.items() for name, value in layer.items()
    }
    facts = {
        "size": size,
        "layers": list(fitted),
        "tokens": text.tokens,
        "rows": len(text.rows),
        "texts": [Path(name).name for name in text.names],
        "text_sha256": fingerprint(text.rows),
        "runtime_seconds": round(time.perf_counter() - begin, 3),
    }
    return found, facts
