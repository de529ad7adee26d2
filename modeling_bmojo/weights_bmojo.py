"""Which weights a model has, adapters included, in a few bytes: what a storage on disk depends on."""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


SAMPLES = 16  # numbers of each weight, evenly spread: whatever trains a weight changes nearly all of its numbers


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """Return 64 hexadecimal digits that are other ones for other weights, names, shapes, dtypes or adapters in use.

    Where devices share the weights all of them must ask: each is put together, one after the other.
    """
    digest = hashlib.sha256()
    named = sorted(model.named_parameters(), key=lambda pair: pair[0])
    for name, value in (part for pair in named for part in _plain_tensors(*pair)):
        count = value.numel()
        index = torch.linspace(0, max(count - 1, 0), min(count, SAMPLES), dtype=torch.float64).long()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        found = whole.detach().reshape(-1)[index.to(value.device)].to("cpu", torch.float64)
        digest.update(f"{name} {list(value.shape)} {value.dtype};".encode() + bytes(found.numpy()))
    for name, module in model.named_modules():
        if isinstance(getattr(module, "disable_adapters", None), bool):  # peft's layers
            used = [] if module.disable_adapters else list(module.active_adapters)
            scaling = getattr(module, "scaling", {})
            digest.update(f"{name} uses {[(each, scaling.get(each)) for each in used]};".encode())
    return digest.hexdigest()


def _plain_tensors(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a weight is made of: itself, or integers and scales, where it is a quantised one."""
    if isinstance(value, DTensor) or not is_traceable_wrapper_subclass(value):
        yield name, value
        return
    for part in value.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{part}", getattr(value, part))


__all__ = ["weights_fingerprint"]
