"""What bounds a figure: how much is to be read or multiplied, how fast this machine does it, and operations.

decoding step   every weight is read once, and all that is remembered: bytes over the rate at which memory is read
prefill         products with the weights, and of queries with the keys and values that they see: floating-point
                operations over the rate of a large product in the same format

Both rates are measured by the threads that measure the rest. A floor is what cannot be undercut, not what is done: the
scan, the norms and everything between the products are left out of it.

Shapes: T tokens, H query heads, D head dim, W window, M eidetic slots, F fading tokens at a stride.
"""

import functools
import time

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from modeling_bmojo.linear_bmojo import project

from .models import FORMATS
from .row import Limits
from .timing import Action


READ_BYTES = 1 << 29  # far beyond any cache
PRODUCT = (2048, 576, 1536)  # tokens, and the sizes of SmolLM2-135M's MLP
TRIES = 15
MARK = "one layer"


def fastest(action: Action) -> float:
    """Return the seconds of the fastest of a few calls, behind one that is not counted."""
    action()
    found = []
    for _ in range(TRIES):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return min(found)


@functools.cache
def read_rate(threads: int) -> float:
    """Return the bytes per second of adding up a large tensor of whole numbers; threads: those of torch, the key."""
    numbers = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    return numbers.nbytes / fastest(numbers.sum)


@functools.cache
def product_rate(threads: int, dtype: str) -> float:
    """Return floating-point operations per second of a large product with a weight, torch's or ours."""
    tokens, given, made = PRODUCT
    x, linear = torch.randn(tokens, given).to(FORMATS[dtype]), torch.nn.Linear(given, made, bias=False)
    linear.to(FORMATS[dtype])
    with torch.inference_mode():
        seconds = min(fastest(lambda: linear(x)), fastest(lambda: project(linear, x)))
    return 2 * tokens * given * made / seconds


def held_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor; those of its parts where it is a quantised weight."""
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is None:
        return tensor.nbytes
    return sum(held_bytes(getattr(tensor, name)) for name in parts()[0])


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of the weights that a step reads: all, but of an embedding without a tied head one row."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(held_bytes(weight) for weight in model.parameters() if weight is not embedding or embedding is head)


def cache_bytes(cache) -> int:
    """Return the bytes of what is remembered: of ours, or keys and values of a cache of transformers."""
    own = getattr(cache, "nbytes", None)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) if own is None else own


def operations(model: torch.nn.Module, action: Action) -> tuple[int, int]:
    """Return how many operations an action starts at the top level, and how many of them in the middle layer."""
    layer, marks = model.model.layers[len(model.model.layers) // 2], []

    def enter(*_) -> None:
        marks.append(record_function(MARK))
        marks[-1].__enter__()

    def leave(*_) -> None:
        marks.pop().__exit__(None, None, None)

    handles = [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        with profile(activities=[ProfilerActivity.CPU]) as found:
            action()
    finally:
        for handle in handles:
            handle.remove()
    events = [event for event in found.events() if event.name != MARK]
    inside = sum(event.cpu_parent is not None and event.cpu_parent.name == MARK for event in events)
    return sum(event.cpu_parent is None for event in events) + inside, inside


def step_limits(model: torch.nn.Module, cache, step: Action) -> Limits:
    """Return the limits of a decoding step. step: one token; it is run once, behind `cache`."""
    total, per_layer = operations(model, step)
    work = weight_bytes(model) + cache_bytes(cache)
    return Limits(work, "B", read_rate(torch.get_num_threads()), total, per_layer)


def keys_seen(config, tokens: int) -> int:
    """Return how many keys the queries of one layer see in all: for the source every earlier token and the own."""
    seen = torch.arange(1, tokens + 1)
    window = getattr(config, "window_size", None)
    if window is None:
        return int(seen.sum())
    beyond = (seen - window).clamp(min=0)
    made = beyond if config.fading_delay is None else (seen - config.fading_delay).clamp(min=0)
    fading = (made // config.fading_stride).clamp(max=config.fading_size)
    return int((seen - beyond + beyond.clamp(max=config.eidetic_size) + fading).sum())


def prefill_limits(model: torch.nn.Module, tokens: int, dtype: str) -> Limits:
    """Return the limits of reading T tokens; the head, which the last token alone takes, is left out."""
    config, layers = model.config, model.model.layers
    maps = [module for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_attention_heads * dim * keys_seen(config, tokens) * len(layers)
    work = 2 * tokens * sum(module.weight.numel() for module in maps) + attention
    return Limits(work, "FLOP", product_rate(torch.get_num_threads(), dtype))
