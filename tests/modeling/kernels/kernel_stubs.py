"""causal-conv1d, mamba-ssm and the hub's copies of them, as far as a CPU can stand in for them.

The functions are written from upstream's documentation and checks: same parameters, layouts and side effects, the
arithmetic by the oracles' loops in float64. Where the real kernel refuses a layout or a dtype, so does the stub; where
it drops a gradient, so does the stub. `DECLARED` holds the parameters as the source distributions declare them.
"""

import inspect
import sys
from types import ModuleType

import torch
import torch.nn.functional as F

from tests.oracles import oracle_ssd


# Read in causal-conv1d 1.7.0 and mamba-ssm 2.3.2.post1. causal-conv1d 1.4.0 and mamba-ssm 2.2.4, the oldest that the
# extra `cuda` allows, declare the same but for `conv_state_indices`.
DECLARED = {
    "causal_conv1d_fn": "(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
    "final_states_out=None, activation=None)",
    "causal_conv1d_update": "(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
    "conv_state_indices=None)",
    "mamba_chunk_scan_combined": "(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, "
    "seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False, "
    "return_varlen_states=False)",
    "selective_state_update": "(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, "
    "state_batch_indices=None)",
    "selective_scan_fn": "(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, "
    "return_last_state=False)",
}
MODULES = {
    "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update"),
    "mamba_ssm": (),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.ssd_combined": ("mamba_chunk_scan_combined",),
    "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update",),
    "mamba_ssm.ops.selective_scan_interface": ("selective_scan_fn",),
}
HALF_OR_FLOAT = (torch.float32, torch.float16, torch.bfloat16)
CALLS: list[str] = []  # names of the functions that ran


def check(condition: bool, message: str) -> None:
    """What TORCH_CHECK and assert do upstream."""
    if not condition:
        raise RuntimeError(message)


# causal-conv1d -------------------------------------------------------------------------------------------------------
def convolve(x, weight, bias, start):
    """[B, C, T] after `start` [B, C, K - 1], in float64."""
    padded = torch.cat([start, x], dim=2).double()
    taps = [padded[:, :, j : j + x.shape[2]] * weight.double()[:, j, None] for j in range(weight.shape[1])]
    return (sum(taps) + (0.0 if bias is None else bias.double()[:, None])).to(x.dtype)


def check_conv(x, weight, bias):
    check(x.dtype in HALF_OR_FLOAT and weight.dtype in HALF_OR_FLOAT, "dtype")
    check(2 <= weight.shape[1] <= 4, "causal_conv1d only supports width between 2 and 4")
    check(weight.shape == (x.shape[1], weight.shape[1]), "weight must have shape (dim, width)")
    check(bias is None or (bias.dtype == weight.dtype and bias.shape == x.shape[1:2]), "bias")


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    CALLS.append("causal_conv1d_fn")
    check(seq_idx is None and not return_final_states and activation is None, "not stood in for")
    check_conv(x, weight, bias)
    if x.stride(2) != 1 and x.stride(1) != 1:
        x = x.contiguous()
    channel_last = x.stride(1) == 1 and x.stride(2) > 1
    if channel_last:
        check(x.shape[1] % 8 == 0, "channel dimension divisible by 8")
        check(x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0, "strides must be multiples of 8")
        check(x.storage_offset() % 8 == 0, "reads vectors of 16 bytes")
    start = x.new_zeros(*x.shape[:2], weight.shape[1] - 1)
    if initial_states is not None:
        check(channel_last, "initial_states is only supported for channel last layout")
        check(initial_states.dtype == x.dtype and initial_states.shape == start.shape, "initial_states")
        check(initial_states.stride(1) == 1, "initial_states must be channel last")
        start = initial_states
    return convolve(x, weight, bias, start)


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):
    CALLS.append("causal_conv1d_update")
    check(activation is None and cache_seqlens is None and conv_state_indices is None, "not stood in for")
    check(not torch.is_grad_enabled(), "has no backward: gradients would be silently wrong")
    single = x.dim() == 2
    x = x[..., None] if single else x
    check_conv(x, weight, bias)
    check(conv_state.dtype == x.dtype and conv_state.shape[2] >= weight.shape[1] - 1, "conv_state")
    out = convolve(x, weight, bias, conv_state[:, :, 1 - weight.shape[1] :])
    conv_state.copy_(torch.cat([conv_state, x], dim=2)[:, :, -conv_state.shape[2] :])
    return out[..., 0] if single else out


# mamba-ssm -----------------------------------------------------------------------------------------------------------
def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    CALLS.append("mamba_chunk_scan_combined")
    check(z is None and dt_bias is None and seq_idx is None and cu_seqlens is None, "not stood in for")
    check(x.dtype in HALF_OR_FLOAT and x.dtype == B.dtype == C.dtype, "dtype")
    check(dt.dtype == torch.float32 and A.dtype == torch.float32, "computed in fp32")
    batch, tokens, heads, channels = x.shape
    check(chunk_size >= 16 and chunk_size & (chunk_size - 1) == 0, "chunk_size")
    check(dt.shape == (batch, tokens, heads) and A.shape == (heads,) and B.shape == C.shape, "shapes")
    check(D is None or D.shape == (heads,), "D")
    if initial_states is not None:
        check(initial_states.shape == (batch, heads, channels, B.shape[3]), "initial_states")
    dt = F.softplus(dt) if dt_softplus else dt
    dt = dt.clamp(*dt_limit)
    wide = [None if value is None else value.double() for value in (x, dt, A, B, C, D, initial_states)]
    y, state = oracle_ssd(*wide)
    return (y.to(x.dtype), state.float()) if return_final_states else y.to(x.dtype)


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):
    CALLS.append("selective_state_update")
    check(z is None and state_batch_indices is None and not dt_softplus, "not stood in for")
    check(not torch.is_grad_enabled(), "has no backward: gradients would be silently wrong")
    if dt_bias is None or D is None:  # both are declared optional; the launch unpacks their strides all the same
        raise TypeError("Value after * must be an iterable, not int")
    headed = state.dim() > 3
    many = state if headed else state[:, None]
    x, dt, B, C, A, D, dt_bias = (
        value if headed else value[:, None] if index < 4 else value[None]
        for index, value in enumerate((x, dt, B, C, A, D, dt_bias))
    )
    batch, heads, channels, width = many.shape
    check(x.shape == dt.shape == (batch, heads, channels) and A.shape == (heads, channels, width), "x, dt or A")
    check(B.shape == C.shape and B.shape[0] == batch and B.shape[2] == width, "B or C")
    check(D.shape == dt_bias.shape == (heads, channels) and many.dtype == torch.float32, "D, dt_bias or state")
    repeat = heads // B.shape[1]
    write, read = (value.double().repeat_interleave(repeat, dim=1)[:, :, None] for value in (B, C))
    step = (dt.double() + dt_bias.double())[..., None]
    after = torch.exp(step * A.double()) * many.double() + step * x.double()[..., None] * write
    many.copy_(after)
    out = ((after * read).sum(-1) + D.double() * x.double()).to(x.dtype)
    return out if headed else out[:, 0]


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    CALLS.append("selective_scan_fn")
    check(z is None and delta_bias is None and not delta_softplus, "not stood in for")
    check(u.dtype in HALF_OR_FLOAT and u.dtype == delta.dtype == B.dtype == C.dtype, "dtype")
    check(A.dtype == torch.float32 and (D is None or D.dtype == torch.float32), "A and D are fp32")
    check(A.shape[1] <= 256, "selective_scan only supports state dimension <= 256")
    y, state = oracle_s6(*(None if v is None else v.double() for v in (u.mT, delta.mT, A, B.mT, C.mT, D)))
    y, state = y.mT.to(u.dtype), state.float()
    # "Note that the gradient of the last state is not considered in the backward pass."
    state = state.detach() + 0.0 * state
    return (y, state) if return_last_state else y


def oracle_s6(x, dt, A, B, C, D=None, initial_state=None):
    """S6 by its recurrence: x, dt [B, T, I], A [I, N], B, C [B, T, N], D [I], state [B, I, N]."""
    state = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)
    return (y if D is None else y + D * x), state


FUNCTIONS = {name: globals()[name] for name in DECLARED}


def install(monkeypatch, *packages: str) -> None:
    """Puts the stubs of `packages` where `import` finds them."""
    for name, functions in MODULES.items():
        if name.partition(".")[0] in packages:
            module = ModuleType(name)
            for function in functions:
                setattr(module, function, FUNCTIONS[function])
            monkeypatch.setitem(sys.modules, name, module)


# The hub -------------------------------------------------------------------------------------------------------------
# The layers of kernels-community/mamba-ssm: parameters in transformers' order and names, the convolution without
# initial states and with everything unknown swallowed by **kwargs.
class HubConv(torch.nn.Module):
    def forward(self, hidden_states, weight, bias=None, activation=None, **kwargs):
        return causal_conv1d_fn(x=hidden_states, weight=weight, bias=bias, activation=activation)


class HubConvUpdate(torch.nn.Module):
    def forward(self, hidden_states, conv_state, weight, bias=None, activation=None):
        return causal_conv1d_update(hidden_states, conv_state, weight, bias=bias, activation=activation)


class HubScan(torch.nn.Module):
    def forward(
        self,
        hidden_states,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=None,
        dt_bias=None,
        initial_states=None,
        dt_softplus=False,
        dt_limit=(0.0, float("inf")),
        return_final_states=False,
        **kwargs,
    ):
        options = dict(dt_softplus=dt_softplus, dt_limit=dt_limit, return_final_states=return_final_states)
        return mamba_chunk_scan_combined(
            hidden_states, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, initial_states=initial_states, **options
        )


class HubStateUpdate(torch.nn.Module):
    def forward(self, state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs):
        return selective_state_update(
            state, hidden_states, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus
        )


class HubS6(torch.nn.Module):
    def forward(
        self,
        hidden_states,
        dt,
        A,
        B,
        C,
        D=None,
        z=None,
        delta_bias=None,
        delta_softplus=False,
        return_last_state=False,
        use_mambapy=False,
        use_associative_scan=False,
        **kwargs,
    ):
        options = dict(delta_bias=delta_bias, delta_softplus=delta_softplus, return_last_state=return_last_state)
        return selective_scan_fn(hidden_states, dt, A, B, C, D=D, z=z, **options)


LAYERS = {
    "causal_conv1d_fn": HubConv,
    "causal_conv1d_update": HubConvUpdate,
    "mamba_chunk_scan_combined": HubScan,
    "selective_state_update": HubStateUpdate,
    "selective_scan_fn": HubS6,
}


def declared(function) -> str:
    return str(inspect.signature(function)).replace("'", "")
