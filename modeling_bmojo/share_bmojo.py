"""Share: one device's part of the heads of every layer, and what devices tell each other of theirs.

    device r of n    query heads, key/value heads and SSM heads r H / n ... (r + 1) H / n - 1, and of the groups that
                     share B and C those of its SSM heads: G / n of them, or one that several devices have

    spread           all have a value and use it for their own heads: its gradient is the sum of theirs
    sum              each has a part of a sum: then all have the sum, and whole gradients of it
    total            both: each has a part of a sum, and uses the sum for its own heads
    gather           each has the channels of its heads: then all have those of all heads

A sum is formed once and handed to all: all have the same bits, and decide alike by them.

Two styles for decoder layers in transformers' tensor plans: with `"bmojo_heads"` each device has a share of the heads,
with `"bmojo_whole_heads"` all of them.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from .fields_bmojo import reject


HEADS_STYLE, WHOLE_HEADS_STYLE = "bmojo_heads", "bmojo_whole_heads"


class Share:
    """Part `rank` of `size` equal ones, one on each device of `group`."""

    def __init__(self, group: Any, rank: int, size: int):
        self.group, self.rank, self.size = group, rank, size

    def __deepcopy__(self, memo: dict) -> "Share":
        return self

    def __reduce__(self):
        raise ValueError(
            f"the heads of device {self.rank} of {self.size}: are not pickled, because without the others they are no "
            "cache and no model; call save() of the cache, or save_pretrained() of the model, in all processes."
        )

    # Which heads -----------------------------------------------------------------------------------------------------
    def check(self, config: PreTrainedConfig, has_ssm: bool) -> None:
        """Raise ValueError unless the heads can be shared out: equal parts, and no device with parts of groups."""
        remedy = (
            "take another tp_size, or let every device have all heads: "
            "DistributedConfig(tp_size=..., tp_plan=BMojoForCausalLM.whole_heads_plan(config))"
        )
        for name in ("num_attention_heads", "num_key_value_heads", *(("ssm_num_heads",) if has_ssm else ())):
            if getattr(config, name) % self.size:
                reject(name, getattr(config, name), f"must be a multiple of tp_size={self.size}", remedy)
        groups = config.ssm_num_groups
        if has_ssm and groups % self.size and self.size % groups:
            reject("ssm_num_groups", groups, f"must be a multiple or a divisor of tp_size={self.size}", remedy)

    def config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return a configuration that counts the heads of one device, for what is sized by them."""
        local = copy.copy(config)
        for name in ("num_attention_heads", "num_key_value_heads", "ssm_num_heads"):
            setattr(local, name, getattr(config, name) // self.size)
        local.ssm_num_groups = max(config.ssm_num_groups // self.size, 1)
        return local

    def part(self, count: int) -> slice:
        """Return which of `count` things are here: heads, or their channels."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def groups(self, count: int) -> slice:
        """Return which of `count` groups have heads here."""
        first = self.rank * count // self.size
        return slice(first, first + max(count // self.size, 1))

    def devices(self) -> list["Share"]:
        """Return the shares of all devices, this one's too, in order."""
        return [Share(self.group, rank, self.size) for rank in range(self.size)]

    # What is told ----------------------------------------------------------------------------------------------------
    def spread(self, value: torch.Tensor) -> torch.Tensor:
        """Return a value that every device uses for its own heads."""
        return _Spread.apply(value, self.group) if torch.is_grad_enabled() and value.requires_grad else value

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum over the devices, of which all make the same use."""
        return _Sum.apply(value, self.group)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum over the devices, which each uses for its own heads."""
        return self.spread(self.sum(value))

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """Return the last axes of all devices behind one another, of which all make the same use."""
        return _Gather.apply(value, self)

    def collect(self, value: torch.Tensor) -> list[torch.Tensor]:
        """Return a tensor of one shape from every device, in order, without gradient."""
        value = value.detach().contiguous()
        found = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(found, value, group=self.group)
        return found


class Cut:
    """Of a value that all devices have, the slices of one axis that belong to a device's heads; without a share all.

    Called with the value and the axis. Its gradient is the sum of all devices'.
    """

    def __init__(self, share: Share | None = None, slices: Sequence[slice] = ()):
        self.share, self.slices = share, slices

    def __call__(self, value: torch.Tensor, axis: int = -1) -> torch.Tensor:
        if self.share is None:
            return value
        value = self.share.spread(value)
        parts = [value.narrow(axis, each.start, each.stop - each.start) for each in self.slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


UNCUT = Cut()


def together(parts: list[torch.Tensor], slices: list[list[slice]], axis: int) -> torch.Tensor:
    """Return what the `parts` of all devices were cut from by their `slices` of an axis. Without gradient."""
    size = max(each.stop for own in slices for each in own)
    shape = [size if at == axis else count for at, count in enumerate(parts[0].shape)]
    whole = parts[0].new_empty(shape)
    for part, own in zip(parts, slices):
        pieces = part.split([each.stop - each.start for each in own], dim=axis)
        for each, piece in zip(own, pieces):
            whole.narrow(axis, each.start, each.stop - each.start).copy_(piece)
    return whole


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, group):
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return _summed(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, group):
        return _summed(value, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, share):
        ctx.own = share.part(value.shape[-1] * share.size)
        return torch.cat(share.collect(value), dim=-1)

    @staticmethod
    def backward(ctx, grad):
        return grad[..., ctx.own], None


def _summed(value: torch.Tensor, group: Any) -> torch.Tensor:
    found = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(found, group=group)
    return found


class HeadsParallel(TensorParallelLayer):
    """The style of a decoder layer that has a share of its heads."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Let the layer know its share of the devices of `mesh`."""
        mesh = mesh if mesh.ndim == 1 else mesh["tp"]
        module.accept_share(Share(mesh.get_group(), mesh.get_local_rank(), mesh.size()))
        return module


class WholeHeadsParallel(TensorParallelLayer):
    """The style of a decoder layer that has all heads."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Leave the layer as it is."""
        return module


ALL_PARALLEL_STYLES.register(HEADS_STYLE, HeadsParallel())
ALL_PARALLEL_STYLES.register(WHOLE_HEADS_STYLE, WholeHeadsParallel())


__all__ = ["HEADS_STYLE", "UNCUT", "WHOLE_HEADS_STYLE", "Cut", "Share", "together"]
