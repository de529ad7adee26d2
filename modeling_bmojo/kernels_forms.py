"""What a table of kernels holds: one `Form` per operation. Imports nothing, so that every table can stand on it."""

from collections.abc import Callable
from typing import NamedTuple


PREFERENCE = ("hub", "cuda", "triton", "torch")  # backends, the fastest first
KERNEL_BACKENDS = ("auto", *PREFERENCE)  # values of the setting


class Form(NamedTuple):
    """One implementation of one operation.

    label: its name for people. call: with the torch form's signature; None in a `Choice` for a hub kernel, which
    belongs to a model.
    narrow: takes x, B and C of a scan in the model's dtype. refuse: of a call's arguments, why it cannot, or None.
    backward: gradients flow through it.
    """

    backend: str
    label: str
    call: Callable | None
    narrow: bool = False
    refuse: Callable | None = None
    backward: bool = True


def torch_form(call: Callable) -> Form:
    """Return the table's entry for a function of `*_ops`."""
    return Form("torch", f"torch: {call.__module__.rpartition('.')[2]}.{call.__name__}", call)


def triton_form(call: Callable, refuse: Callable | None = None, backward: bool = True) -> Form:
    """Return the table's entry for a Triton kernel with the signature of the torch form."""
    return Form("triton", f"triton: {call.__name__}", call, refuse=refuse, backward=backward)
