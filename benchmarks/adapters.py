"""Our side of the operation rows: the one place that knows how the package's operations are called.

Shapes: B batch, T tokens, H query heads or SSM heads, G key/value heads or SSM groups, D head dim, P and N channels of
an SSM head and state, E width of an SSM output, W window, M eidetic slots, F fading tokens, L block length.
"""

import torch

from modeling_bmojo import BMojoConfig, attention_ops, delta_ops, kalma_ops, memory_ops, ssm_ops
from modeling_bmojo.dispatch_bmojo import Kernels


KERNELS = Kernels()  # every operation in the form that the model would choose here
DEFAULTS = BMojoConfig()  # the chunk, the block and the predictor that a user gets
CHUNK, BLOCK, TAPS = DEFAULTS.ssm_chunk_size, DEFAULTS.memory_block_size, DEFAULTS.innovation_taps


def scan(x, dt, A, B, C, D) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the chunked SSM scan: y `[B, T, H, P]` and the last state. Shapes as `ssm_ops.naive_ssd`."""
    return KERNELS.run("chunk_scan", x, dt, A, B, C, D, None, CHUNK)


def naive_scan(x, dt, A, B, C, D) -> tuple[torch.Tensor, torch.Tensor]:
    """Return its oracle, token by token."""
    return ssm_ops.naive_ssd(x, dt, A, B, C, D)


def delta(x, log_decay, shares, keys, queries) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the chunked gated delta rule: y `[B, T, H, P]` and the last state. Shapes as `delta_ops.naive_delta`."""
    return KERNELS.run("delta_scan", x, log_decay, shares, keys, queries, None, CHUNK)


def naive_delta(x, log_decay, shares, keys, queries) -> tuple[torch.Tensor, torch.Tensor]:
    """Return its oracle, token by token."""
    return delta_ops.naive_delta(x, log_decay, shares, keys, queries)


def kalma(x, log_decay, mix, keys, queries) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Gated KalmaNet's chunked scan: y `[B, T, H, P]` and the last state. Shapes as `kalma_ops.naive_kalma`."""
    return KERNELS.run("kalma_scan", x, log_decay, mix, keys, queries, None, CHUNK)


def naive_kalma(x, log_decay, mix, keys, queries) -> tuple[torch.Tensor, torch.Tensor]:
    """Return its oracle, token by token."""
    return kalma_ops.naive_kalma(x, log_decay, mix, keys, queries)


def convolve(x, weight, bias) -> torch.Tensor:
    """Return the causal depthwise convolution of `[B, T, C]` with `[C, K]` taps."""
    return KERNELS.run("conv", x, weight, bias)


def innovation_and_expiry(y: torch.Tensor, window: int, slots: int) -> tuple[torch.Tensor, memory_ops.Selection]:
    """From SSM outputs `[B, T, E]` to innovations `[B, T]`, expiries and what every block of queries finds kept."""
    tokens = y.shape[1]
    innovation = KERNELS.run("innovation", y, y.new_zeros(y.shape[0], TAPS, y.shape[2]))
    position = torch.arange(tokens, device=y.device).expand(innovation.shape)
    keys = memory_ops.retention_key(innovation, position, 0.0)
    return innovation, choose(keys, window, slots)


def choose(keys: torch.Tensor, window: int, slots: int) -> memory_ops.Selection:
    """Return the selection by given retention keys `[B, T]`."""
    tokens = keys.shape[1]
    valid = torch.ones_like(keys, dtype=torch.bool)
    return KERNELS.run("expiry", keys, valid, window, slots, BLOCK, tokens)


def memory_attention(query, keys, values, fading_keys, fading_values, selection, window: int, fading: int):
    """Attention over [eidetic | fading | local]: query `[B, T, H, D]`, the others `[B, T, G, D]` -> `[B, T, H, D]`."""
    tokens = query.shape[1]
    place = torch.arange(tokens, device=query.device).expand(selection.expiry.shape)
    inputs = attention_ops.KeySet(keys, values, place, selection.expiry, place)
    outputs = attention_ops.KeySet(fading_keys, fading_values, place + window, place + window + fading, place)
    sets = [
        (inputs, (1 - window, 0)),
        (inputs, selection.slots),
        (outputs, (1 - window - fading, -window)),
    ]
    return KERNELS.run("memory_attention", query, sets, BLOCK, query.shape[-1] ** -0.5)[0]
