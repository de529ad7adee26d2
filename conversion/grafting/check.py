"""The last line of defence of a graft: what was written is read again and must have the logits of its source.

Both models run with their weights on disk: accelerate's hooks fetch the tensors of one module when it is called and let
go of them after it, embeddings are fetched for the tokens at hand only, and the head is multiplied by a few rows at a
time. So the memory is that of the largest matrix of a layer in float32, however large the models are.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import cpu_offload, init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_bmojo import BMojoConfig, BMojoForCausalLM, cache_of

from ..common.running import meta_model, tensor_shapes
from ..common.weights import LazyTensors, Weights, open_weights, row_blocks
from .families import source_window
from .sources import Source


CHECK_TOKENS = 64
CHECK_TOLERANCE = 1e-3  # of the logits' largest magnitude, float32


@torch.no_grad()
def check_against_source(
    folder: Path, source: Source, dtypes: Mapping[str, torch.dtype], seed: int
) -> dict[str, float]:
    """Compare the logits of a written folder with its source's inside the window, in float32.

    Args:
        dtypes: in which the graft has the source's tensors, by their names there; they are rounded to it here, so that
            what the graft's settings round counts as no difference. seed: of the tokens.

    Returns:
        `tokens`, `max_logit_difference`, `logit_scale`.

    Raises:
        ValueError: tensors are missing from the folder, the memories hold values that are not finite, or the logits
            differ by more than CHECK_TOLERANCE allows.
    """
    config = BMojoConfig.from_pretrained(folder)
    tokens = min(CHECK_TOKENS, config.alone, source_window(source.config) or CHECK_TOKENS)
    ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    written = open_weights(folder, f"the written checkpoint {folder.name!r}")
    check_complete(config, written)
    ours = graft_logits(small_memory(config, tokens), written, ids)
    theirs = source_logits(source, dtypes, ids)
    difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not difference <= CHECK_TOLERANCE * scale:
        raise ValueError(
            f"the graft does not reproduce its source: on {tokens} tokens the logits differ by {difference:.3g} at a "
            f"scale of {scale:.3g}. The source computes something that its row of "
            "conversion/grafting/family_table.py omits."
        )
    return {"tokens": tokens, "max_logit_difference": difference, "logit_scale": scale}


def check_complete(config: BMojoConfig, written: Weights) -> None:
    """Refuse a folder whose tensors are not those of its config (ValueError)."""
    wanted = tensor_shapes(meta_model(config))
    wrong = sorted(name for name in wanted | written.shapes if wanted.get(name) != written.shapes.get(name))
    if wrong:
        raise ValueError(f"the written checkpoint does not load completely: {wrong} are missing, unknown or misshapen.")


def small_memory(config: BMojoConfig, tokens: int) -> BMojoConfig:
    """Return the config with memories just large enough to read `tokens` tokens, all of them inside the window."""
    small = copy.deepcopy(config)
    if config.fading_delay is None:  # else the window is not what hides fading tokens from the first queries
        stride = config.fading_stride  # which must divide the window
        small.window_size = min(config.window_size, -(-tokens // stride) * stride)
    small.eidetic_size = min(config.eidetic_size, tokens)
    return small


@contextmanager
def _sketches_follow() -> Iterator[None]:
    """While a model is built whose sketches are read from a file: no warning that they are random until then."""
    logger = logging.getLogger("modeling_bmojo.sketches")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def graft_logits(config: BMojoConfig, weights: Weights, ids: torch.Tensor) -> torch.Tensor:
    """Return logits `[1, T, V]` of a graft; raises ValueError where its states are not finite after the tokens."""
    with init_empty_weights(include_buffers=False), _sketches_follow():
        model = BMojoForCausalLM(config)
    # With a cache, so that the fading memories run too, although no token is beyond the window yet.
    out = on_disk(model, weights, {})(input_ids=ids, use_cache=True)
    for index, layer in enumerate(cache_of(out).layers):
        wrong = [name for name, state in layer.states().items() if not state.isfinite().all()]
        if wrong:
            raise ValueError(
                f"layer {index} of the graft: after {ids.shape[1]} tokens its states {wrong} are not finite."
            )
    return out.logits


def source_logits(source: Source, dtypes: Mapping[str, torch.dtype], ids: torch.Tensor) -> torch.Tensor:
    """Return logits `[1, T, V]` of the source by transformers' own class, its weights rounded to `dtypes`."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(source.config), dtype=torch.float32)
    return on_disk(model, source, dtypes)(input_ids=ids, use_cache=False).logits


def on_disk(model: nn.Module, weights: Weights, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """Return the model in evaluation mode, its parameters read when they are needed and used in float32.

    Args:
        model: with parameters on the meta device, called as in `weights`; a tied head is that of the embeddings.
        dtypes: to which the named tensors are rounded; the others are taken as they are.
    """

    def rows(name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        found = weights.rows(name, start, stop)
        return found.to(dtypes.get(name, found.dtype)).float()

    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedded = names[id(embeddings)]
    projected = embedded if model.config.tie_word_embeddings else names[id(head)]
    model.set_input_embeddings(RowsOfEmbeddings(rows, embedded))
    model.set_output_embeddings(RowsOfHead(rows, projected, tuple(head.weight.shape)))
    parameters = LazyTensors((name for name, _ in model.named_parameters()), rows)
    return cpu_offload(model.eval(), execution_device=torch.device("cpu"), state_dict=parameters)


class RowsOfEmbeddings(nn.Module):
    """An embedding table on disk: ids `[B, T]` to rows `[B, T, E]`."""

    def __init__(self, rows, name: str):
        super().__init__()
        self._rows, self._name = rows, name

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = [self._rows(self._name, index, index + 1) for index in ids.flatten().tolist()]
        return torch.cat(found).unflatten(0, ids.shape)


class RowsOfHead(nn.Module):
    """A head on disk: hidden states `[B, T, E]` to logits `[B, T, V]`, block by block of the vocabulary."""

    def __init__(self, rows, name: str, shape: tuple[int, int]):
        super().__init__()
        self._rows, self._name, self._shape = rows, name, shape

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        vocabulary, width = self._shape
        blocks = row_blocks(vocabulary, 4 * width)
        return torch.cat([hidden_states @ self._rows(self._name, *block).T for block in blocks], dim=-1)
