"""Hub kernels: what `from_pretrained(..., use_kernels=True)` fetches becomes the first choice of a model's operations.

transformers (through the package `kernels`) replaces functions by name in everything that a model lists under
`_kernel_funcs`. A model that is asked for kernels therefore lists one empty slot per upstream function, lets
transformers fill them, and hands the filled ones to its `Kernels`. The slots belong to the model: filling them touches
neither transformers' own models nor another model on another device.

The fetched functions are those of kernels-community/mamba-ssm. Their leading arguments are those of the packages, so
that the forms of `kernels_cuda` fit; only their convolution takes no initial states.
"""

import inspect
from collections.abc import Callable

from torch import nn
from transformers.integrations import use_kernel_forward_from_hub

from .dispatch_bmojo import Kernels
from .kernels_cuda import KERNELS, conv_form
from .kernels_forms import Form


# The parameters of transformers' own functions of these names: `kernels` accepts a replacement only if their number and
# kinds agree.
SLOTS = {
    "causal_conv1d_fn": ("hidden_states", "weight", "bias", "activation", "**kwargs"),
    "causal_conv1d_update": ("hidden_states", "conv_state", "weight", "bias", "activation"),
    "mamba_chunk_scan_combined": (
        *("hidden_states", "dt", "A", "B", "C", "chunk_size", "D", "dt_bias", "initial_states", "dt_softplus"),
        *("dt_limit", "return_final_states", "**kwargs"),
    ),
    "selective_state_update": (
        *("state", "hidden_states", "dt", "A", "B", "C", "D", "dt_bias", "dt_softplus", "z", "**kwargs"),
    ),
    "selective_scan_fn": (
        *("hidden_states", "dt", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state"),
        *("use_mambapy", "use_associative_scan", "**kwargs"),
    ),
}


def offer_slots(model: nn.Module) -> None:
    """List the functions that transformers may fill. Does nothing where `kernels` is missing or switched off."""
    listed = model.__dict__.get("_kernel_funcs", {})
    slots = {name: use_kernel_forward_from_hub(name)(_empty_slot(name)) for name in SLOTS if name not in listed}
    slots = {name: slot for name, slot in slots.items() if hasattr(slot, "kernel_layer_name")}
    if slots:
        model.__dict__["_kernel_funcs"] = listed | slots


def take_kernels(model: nn.Module, asked: bool) -> None:
    """Hand the filled slots to every `Kernels` of the model; `asked=False` takes them away again."""
    listed = model.__dict__.get("_kernel_funcs", {})
    filled = {name: slot for name, slot in listed.items() if name in SLOTS and _is_filled(slot)}
    forms = {op: hub_form(op, filled[kernel.name]) for op, kernel in KERNELS.items() if kernel.name in filled}
    for module in model.modules():
        kernels = module.__dict__.get("kernels")
        if isinstance(kernels, Kernels):
            kernels.hub = forms if asked else None
            kernels.hub_device = model.device.type if asked else None


def hub_form(op: str, function: Callable) -> Form:
    """Return the form of `op` around a function from the hub."""
    kernel = KERNELS[op]
    call = conv_form(function, takes_history=False) if op == "conv" else kernel.form(function)
    return kernel.bound("hub", call)


def _empty_slot(name: str) -> Callable:
    def slot(*args, **kwargs):
        raise ValueError(f"{name}: no hub kernel was loaded; load the model with use_kernels=True, or use another one.")

    kinds = [
        inspect.Parameter(parameter.lstrip("*"), inspect.Parameter.VAR_KEYWORD)
        if parameter.startswith("**")
        else inspect.Parameter(parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for parameter in SLOTS[name]
    ]
    slot.__name__ = slot.__qualname__ = name
    slot.__signature__ = inspect.Signature(kinds)
    return slot


def _is_filled(slot: nn.Module) -> bool:
    """`kernels` sets another forward on the instance; falling back, it sets the class's own."""
    return getattr(slot.forward, "__func__", None) is not type(slot).forward
