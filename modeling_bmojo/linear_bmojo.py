"""Linear maps for decoding on CPUs: the product with few rows on all threads.

    y = x W^T + b                    x [..., I], W [O, I], y [..., O]

Decoding waits for W to come from memory, and the fp32 product of a few rows with W runs on one thread, whatever the
number of threads. Cut into as many parts of O as there are threads, the same dot products run on all of them.

The maps are `nn.Linear` itself, which tools that quantise, prune or adapt models look for by exact type. Who calls one
asks `project`, and where anything but the plain product is wanted, the module is called.
"""

from functools import cache

import torch
from torch import nn

# The dictionaries that nn.Module asks at every call; torch fills them in place.
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks


FEW_ROWS = 8  # from about 16 rows on, the plain product uses all threads well (docs/performance.md)

# Packages whose forward hooks place, gather, cast or quantise tensors and look at no column.
INFRASTRUCTURE = ("torch", "accelerate", "deepspeed", "transformers", "optimum")

PACKED_ROWS = 32  # of a weight, which bitsandbytes' kernel for CPUs holds together


def project(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`linear(x)`, `[..., I]` to `[..., O]`; a handful of rows in fp32 on a CPU, without gradient, on all threads.

    Only for an `nn.Linear` that nobody listens to or has changed: no subclass, hook, parametrisation or forward of its
    own. Every other module is called as it is.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu or x.dtype != torch.float32:
        return linear(x)
    threads = torch.get_num_threads()
    if threads == 1 or not 0 < x.numel() <= FEW_ROWS * x.shape[-1] or not _is_plain(linear):
        return linear(x)
    weight, bias = linear.weight, linear.bias
    size_out, size_in = weight.shape
    parts = parts_for(size_out, threads)
    if parts == 1 or not weight.is_contiguous() or torch.is_autocast_enabled("cpu"):
        return linear(x)
    rows = x.reshape(1, -1, size_in).expand(parts, -1, -1)
    out = torch.bmm(rows, weight.view(parts, -1, size_in).transpose(1, 2))
    out = out.transpose(0, 1).reshape(*x.shape[:-1], size_out)
    return out if bias is None else out + bias


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling the module is the product with its weight and nothing else."""
    if type(linear) is not nn.Linear:
        return False
    weight = linear.weight
    return (
        type(weight) is nn.Parameter  # no tensor subclass: it may be sharded or quantised
        and weight.dtype == torch.float32
        and weight.is_cpu  # a weight may be elsewhere, or nowhere, until a forward of its own has fetched it
        and "forward" not in linear.__dict__
        and not (
            linear._forward_hooks or linear._forward_pre_hooks or _global_forward_hooks or _global_forward_pre_hooks
        )
    )


def avoid_packing(module: nn.Module) -> bool:
    """Keep bitsandbytes' CPU kernel away from a 4-bit map whose sizes it cannot pack; whether there was need for it.

    On CPUs with AVX512-BF16 a `Linear4bit` packs its weight at the first call, and asserts where the sizes do not fit:
    an SSM's in_proj has a row per head for the time steps. Without the kernel it dequantises, as on other CPUs.
    """
    if not getattr(module, "support_avx512bf16_for_cpu", False):
        return False
    if module.out_features % PACKED_ROWS == 0 and module.in_features % module.weight.blocksize == 0:
        return False
    module.support_avx512bf16_for_cpu = False
    return True


def listeners(module: nn.Module, packed: bool) -> list[str]:
    """Forward hooks on a module or inside it that may look at columns, by name.

    Not those of libraries that move, shard or convert tensors whatever they hold; nor PEFT's choice of adapters, which
    goes by row, unless packed sequences have made more rows.
    """
    found = []
    for part in module.modules():
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values()):
            function = getattr(hook, "func", hook)  # of functools.partial
            named = function if hasattr(function, "__name__") else type(function)
            by_row = named.__name__ == "_adapter_names_pre_forward_hook" and not packed
            if named.__module__.partition(".")[0] not in INFRASTRUCTURE and not by_row:
                found.append(f"{named.__module__}.{named.__name__}")
    return found


@cache
def parts_for(size: int, threads: int) -> int:
    """Equal parts of `size` rows that keep `threads` threads busy; 1 if there are none, or there is one thread."""
    if threads == 1:
        return 1
    return next((parts for parts in range(threads, 4 * threads + 1) if size % parts == 0), 1)
