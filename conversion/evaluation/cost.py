"""What a model costs: tokens per second of reading and of writing, and the bytes of its memory of the text.

Reading is done in pieces, with the logits of the last token only, as generation does it. A first pass is not timed: it
pays for kernels that are compiled, pages that are first touched, and caches that are cold. One run after another in one
process on whatever machine this is: good for orders of magnitude. Ratios to build on come from `make bench`.
"""

import statistics
import time
from collections import deque
from typing import Any

import torch

from modeling_bmojo import CACHE_NAME, cache_of

from ..common.nll import in_pieces


@torch.inference_mode()
def measure_cost(
    model: torch.nn.Module, ids: torch.Tensor, chunk: int, steps: int, rounds: int, bar: Any = None
) -> dict:
    """Return medians over `rounds` of reading `ids` `[1, T]` and of writing `steps` tokens behind it, after one untimed
    pass.

    Returns:
        `prefill` and `decode` in tokens per second, `cache_bytes` after both, and `tokens`, how many were read.
    """
    ids = ids.to(next(model.parameters()).device)
    prefill, decode = [], []
    for turn in range(1 + rounds):
        reading, writing, cache = _pass(model, ids, chunk, steps, bar)
        if turn > 0:
            prefill.append(ids.shape[1] / reading)
            decode.append(steps / writing)
    return {
        "prefill": statistics.median(prefill),
        "decode": statistics.median(decode),
        "cache_bytes": cache_bytes(cache),
        "tokens": ids.shape[1],
    }


def _pass(model: torch.nn.Module, ids: torch.Tensor, chunk: int, steps: int, bar: Any) -> tuple[float, float, Any]:
    """Return seconds of reading `ids` and of writing `steps` tokens, and the cache after both."""
    start = _now(ids.device)
    out = deque(in_pieces(model, ids, chunk, bar, logits_to_keep=1), maxlen=1).pop()
    cache, token = cache_of(out), out.logits[:, -1:].argmax(-1)
    middle = _now(ids.device)
    for _ in range(steps):
        out = model(input_ids=token, **{CACHE_NAME: cache}, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return middle - start, _now(ids.device) - middle, cache


def cache_bytes(cache: Any) -> int:
    """Return bytes of all tensors that a cache holds: B'MOJO's own count, or the keys and values of transformers'
    caches."""
    if type(cache).__name__ == "BMojoCache":
        return cache.nbytes
    return sum(value.nbytes for layer in cache.layers for value in (layer.keys, layer.values))


def device_bytes(cache: Any) -> int:
    """Return `cache_bytes` without the keys and values of stored tokens that lie in the host's memory: on a CPU all."""
    if type(cache).__name__ != "BMojoCache":
        return cache_bytes(cache)
    on_host = [
        layer.stored_nbytes
        for layer in cache.layers
        if layer.device.type == "cpu" or any(state.on_host for state in layer.memory.declared.values())
    ]
    return cache.nbytes - sum(on_host)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
