"""Linear maps on CPUs: fp32 products by oneDNN, one row on all threads, and one row of compiled code written out.

    y = x W^T + b                    x [..., I], W [O, I], y [..., O]

One row waits for W to come from memory, and a call of oneDNN takes longer than it waits; so W is cut into as many parts
of O as there are threads, and MKL runs the same dot products on all of them.

The maps are `nn.Linear` itself, which tools that quantise, prune or adapt models look for by exact type. Who calls one
asks `project`, and where anything but the plain product is wanted, the module is called.
"""

from functools import cache

import torch
from torch import nn

# The dictionaries that nn.Module asks at every call; torch fills them in place.
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .onednn_bmojo import product, suits


NARROW = (torch.float32, torch.bfloat16, torch.float16)

# Packages whose forward hooks place, gather, cast or quantise tensors and look at no column.
INFRASTRUCTURE = ("torch", "accelerate", "deepspeed", "transformers", "optimum")

PACKED_ROWS = 32  # of a weight, which bitsandbytes' kernel for CPUs holds together


def project(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`linear(x)`, `[..., I]` to `[..., O]`; in fp32 on an x86 CPU by oneDNN or, one row without gradient, on all
    threads.

    Only for an `nn.Linear` that nobody listens to or has changed: no subclass, hook, parametrisation or forward of its
    own. Every other module is called as it is.
    """
    if not x.is_cpu or (torch.compiler.is_compiling() and torch.is_grad_enabled()):
        return linear(x)
    if torch.compiler.is_compiling():
        return _project_compiled(linear, x)
    if x.dtype != torch.float32 or not _is_plain(linear, x.dtype) or torch.is_autocast_enabled("cpu"):
        return linear(x)
    weight, bias = linear.weight, linear.bias
    if not weight.is_contiguous():
        return linear(x)
    if not torch.is_grad_enabled() and x.numel() == x.shape[-1]:
        parts = parts_for(weight.shape[0], torch.get_num_threads())
        if parts > 1:
            return _in_parts(linear, x, parts)
    return product(x, weight, bias) if suits(x, weight, bias) else linear(x)


def _in_parts(linear: nn.Linear, x: torch.Tensor, parts: int) -> torch.Tensor:
    """Return the product of one row as one of `parts` matrices, which torch shares out to its threads."""
    weight, bias = linear.weight, linear.bias
    size_out, size_in = weight.shape
    row = x if x.dim() <= 3 else x.reshape(1, size_in)
    out = torch.bmm(row.expand(parts, 1, size_in), weight.view(parts, -1, size_in).mT).view(*x.shape[:-1], size_out)
    return out if bias is None else out + bias


def _project_compiled(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Do what `project` does where a compiler traces it: one row is written out as sums, in fp32 at least, from which
    the compiler makes a loop over W on all threads that reads it at the speed of the memory; on one thread, too, it is
    faster than the libraries' products of one row (docs/performance.md).

    Not for an exported program, which others run, each with its own products; not in float64, where results are
    compared to the last bits.
    """
    if torch.compiler.is_exporting() or not is_one_narrow_row(x):
        return linear(x)
    if torch.is_autocast_enabled("cpu"):
        return linear(x)
    weight, bias = linear.weight, linear.bias
    if is_dequantised(weight) and _is_unchanged(linear):
        numbers = weight.dequantize(torch.float32)  # never as a whole: within the loop of the sums
    elif _is_plain(linear, x.dtype):
        numbers = weight
    else:
        return linear(x)
    out = (x.reshape(-1).float() * numbers.float()).sum(-1)
    out = out if bias is None else out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def is_one_narrow_row(x: torch.Tensor) -> bool:
    """Whether x `[..., I]` is a single row, of a dtype whose product is written out where it is compiled."""
    return x.dtype in NARROW and x.numel() == x.shape[-1]


def _is_plain(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Whether calling the module is the product with its weight of this dtype and nothing else."""
    if not _is_unchanged(linear):
        return False
    weight = linear.weight
    return (
        type(weight) is nn.Parameter  # no tensor subclass: it may be sharded or quantised
        and weight.dtype == dtype
        and weight.layout is torch.strided
        and weight.is_cpu  # a weight may be elsewhere, or nowhere, until a forward of its own has fetched it
    )


def _is_unchanged(linear: nn.Module) -> bool:
    """Whether calling the module is `nn.Linear.forward` and nothing else."""
    return (
        type(linear) is nn.Linear
        and "forward" not in linear.__dict__
        and not (linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks)
        and not (linear._backward_pre_hooks or _global_forward_hooks or _global_forward_pre_hooks)
        and not (_global_backward_hooks or _global_backward_pre_hooks)
    )


def is_dequantised(weight: torch.Tensor) -> bool:
    """Whether a product with this weight is one with `weight.dequantize()`: torchao's 8-bit numbers with scales, where
    what is multiplied with them is neither scaled nor rounded first."""
    kind = type(weight)
    return (
        kind.__name__ == "Int8Tensor"
        and kind.__module__.partition(".")[0] == "torchao"
        and weight.is_cpu
        and getattr(weight, "act_quant_kwargs", None) is None
        and getattr(weight, "act_pre_scale", None) is None
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
