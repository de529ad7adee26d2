"""Which weights a model has, adapters included, in a few bytes: what a storage on disk depends on."""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary


SAMPLES = 16  # numbers of each weight, evenly spread: they tell weights apart whose sums are one, such as other rows

# Of each weight the version, place and sum of its bytes when last added up: only what changed is added up again.
_totals = WeakIdKeyDictionary()


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """Return 64 hexadecimal digits that are other ones for other weights, names, shapes, dtypes or adapters in use.

    Every byte counts: a single number that changes, changes it (but by `.data` after the first call, which tells
    nobody, unless the number is one of the SAMPLES). Where devices share the weights all of them must ask: each is put
    together, one after the other.
    """
    digest = hashlib.sha256()
    named = sorted(model.named_parameters(), key=lambda pair: pair[0])
    for name, value in (part for pair in named for part in _plain_tensors(*pair)):
        count = value.numel()
        index = torch.linspace(0, max(count - 1, 0), min(count, SAMPLES), dtype=torch.float64).long()
        whole = value.full_tensor() if isinstance(value, DTensor) else value.detach()
        found = whole.reshape(-1)[index.to(value.device)].to("cpu", torch.float64)
        said = f"{name} {list(value.shape)} {value.dtype} {_total(value, whole)};"
        digest.update(said.encode() + bytes(found.numpy()))
    for name, module in model.named_modules():
        if isinstance(getattr(module, "disable_adapters", None), bool):  # peft's layers
            used = [] if module.disable_adapters else list(module.active_adapters)
            scaling = getattr(module, "scaling", {})
            digest.update(f"{name} uses {[(each, scaling.get(each)) for each in used]};".encode())
    return digest.hexdigest()


def _total(value: torch.Tensor, whole: torch.Tensor) -> int:
    """Return the sum of all bytes of a weight, eight by eight, modulo 2^64: in whichever order, it is the same."""
    now = None if isinstance(value, DTensor) or value.is_inference() else (value._version, value.data_ptr())
    if now is not None and _totals.get(value, (None,))[0] == now:
        return _totals[value][1]
    flat = whole.reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    count = flat.numel() * flat.element_size() // 8 * 8
    raw = flat.view(torch.uint8)
    total = int(raw[:count].view(torch.int64).sum()) + int(raw[count:].sum())
    if now is not None:
        _totals[value] = now, total
    return total


def _plain_tensors(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a weight is made of: itself, or integers and scales, where it is a quantised one."""
    if isinstance(value, DTensor) or not is_traceable_wrapper_subclass(value):
        yield name, value
        return
    for part in value.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{part}", getattr(value, part))


__all__ = ["weights_fingerprint"]
