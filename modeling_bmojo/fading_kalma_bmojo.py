"""GatedKalmaFadingMemory: the selective SSM of a layer as a Gated KalmaNet (arXiv 2511.21016).

    z | xBC | a | b | m = in_proj(u);   x | B | C = act(conv(xBC));   x, B for each head;   B, C to length 1
    s = sigmoid(b + share_bias) + 1e-6;   mix = sigmoid(m + mix_bias)
    y = kalma(s x, exp(-exp(A_log) softplus(a + dt_bias)), mix, s B, C / sqrt(N))
    y = out_proj(norm(y) * silu(z))

Beside `GatedDeltaFadingMemory`: a query is answered by the ridge regression of all values written on all their keys
(`kalma_ops`). Groups share values and keys, as attention's do; each head has its own query.

Shapes: as `fading_delta_bmojo`; r the rank of the maps from groups to heads.
"""

import torch
from torch import nn
from transformers import initialization as init

from .fading_bmojo import Prediction, SSMScalars
from .fading_delta_bmojo import GatedDeltaFadingMemory
from .kalma_ops import predict_kalma_input
from .states_bmojo import State


LENGTH_EPS = 1e-6  # added to the length of keys and queries
LEAST_SHARE = 1e-6  # of a token that is written


class KalmaScalars(SSMScalars):
    """Also the biases of the share that is written and of how far the solution replaces the query, `[H]` each."""

    def __init__(self, heads: int):
        super().__init__((heads,), heads, skips=False)
        self.share_bias = nn.Parameter(torch.empty(heads))
        self.mix_bias = nn.Parameter(torch.empty(heads))

    def initialise(self, config):
        super().initialise(config)
        init.zeros_(self.share_bias)
        init.zeros_(self.mix_bias)

    def forward(self, dtype):
        """Return a (negative rates), dt_bias, share_bias and mix_bias in `dtype`."""
        rates, dt_bias, _ = super().forward(dtype)
        biases = (self.cut(value, 0).to(dtype, copy=True) for value in (self.share_bias, self.mix_bias))
        return rates, dt_bias, *biases


class GatedKalmaFadingMemory(GatedDeltaFadingMemory):
    """The SSM of one layer, which answers by a regression on all it has read.

    Its tensors are those of the published layer (hybrid-model-factory, `gka.`), some of them one below the other:

        in_proj.weight `[H P + G P + G N + H N + 3 H, E]`  g_proj, v_proj, k_proj, q_proj, a_proj, b_proj, alpha_proj
        conv.weight    `[G P + G N + H N, K]`              v_conv1d, k_conv1d, q_conv1d, their middle axis left out
        scalars        A_log, dt_bias, share_bias, mix_bias `[H]`    A_log, dt_bias, b_proj.bias, alpha_proj.bias
        norm.weight    `[P]`                               o_norm.weight
        out_proj.weight `[E, H P]`                         o_proj.weight
        keys_down, keys_up, values_down, values_up         proj_k.linearA, .linearB, proj_v.linearA, .linearB
        keys_repeat, values_repeat `[H, G]`                k_rep, v_rep; without them 1 where the head is of the group

    The last two rows only with `ssm_expand_rank`. For `innovation="state"` the prediction of x_t is U (H + lambda I)^-1
    B_t, of the state before token t, with x_t and B_t not scaled by s: what the regression on all earlier tokens says
    under its key, whose error is a Kalman filter's innovation. U B_t alone would count what many tokens say many times.
    """

    name = "kalmanet"
    operations = ("conv", "conv_step", "kalma_scan", "kalma_step")
    about = "Gated KalmaNet: one decay and one share per head; a ridge regression of all values on all keys answers"
    gates = 3

    @classmethod
    def shares_values(cls, config):
        return True

    @classmethod
    def states(cls, config):
        channels = config.ssm_head_dim + config.ssm_state_size
        return {**super().states(config), "ssm": State((config.ssm_num_heads, channels, config.ssm_state_size), "wide")}

    @classmethod
    def example(cls, operation, config):
        if operation in ("kalma_scan", "kalma_step"):
            heads, keys = config.ssm_num_heads, torch.empty(1, 1, config.ssm_num_heads, config.ssm_state_size)
            x, gates = torch.empty(1, 1, heads, config.ssm_head_dim), torch.empty(1, 1, heads)
            return x, gates, gates, keys, keys
        return super().example(operation, config)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.scalars = KalmaScalars(self.heads)
        self.steps, self.ridge = config.ssm_solver_steps, config.ssm_ridge

    def _scan(self, mixed, steps, lengths, layer, predicts) -> tuple[torch.Tensor, Prediction | None]:
        """Return the recurrence of mixer rows in fp32 at least: of x|B|C `[R', T', ...]` and a|b|m `[R', T', 3 H]`.

        Returns y `[R', T', H P]` and the prediction, or None.
        """
        wide = torch.promote_types(mixed.dtype, torch.float32)
        op = "kalma_step" if mixed.shape[1] == 1 and layer is not None else "kalma_scan"
        x, *keys = self._of_heads(mixed.to(wide))
        B, C = (_normed(each) for each in keys)
        log_decay, share, mix = self._gates(steps.to(wide), lengths)
        written = share[..., None] * x, share[..., None] * B
        # A copy where a backward pass may still need what the state was; else a step writes into it.
        state = None if layer is None else layer.ssm.to(wide, copy=torch.is_grad_enabled())
        options, prediction = (self.chunk_size, self.steps, self.ridge), None
        if predicts:
            with torch.no_grad():
                said = predict_kalma_input(written[0], log_decay, written[1], B, state, *options)
                prediction = x.flatten(2).detach(), said.flatten(2)
        given = written[0], log_decay, mix, written[1], C * self.state**-0.5
        y, after = self.kernels.run(op, *given, state, *options)
        if layer is not None and after is not layer.ssm:
            layer.ssm.copy_(after.detach())
        return y.flatten(2), prediction

    def _gates(self, steps: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return log decays, shares and mix `[R', T', H]`, of pads zeros but for the mix."""
        dt, share, mix = steps.chunk(3, dim=-1)
        A, dt_bias, share_bias, mix_bias = self.scalars(steps.dtype)
        log_decay = self._time_step(dt + dt_bias) * A
        share, mix = torch.sigmoid(share + share_bias) + LEAST_SHARE, torch.sigmoid(mix + mix_bias)
        if lengths is not None:
            real = (torch.arange(steps.shape[1], device=steps.device) < lengths[:, None])[..., None]
            log_decay, share = log_decay * real, share * real
        return log_decay, share, mix


def _normed(keys: torch.Tensor) -> torch.Tensor:
    """Return keys or queries `[..., N]` at length 1."""
    return keys / (torch.linalg.vector_norm(keys, dim=-1, keepdim=True) + LENGTH_EPS)


__all__ = ["GatedKalmaFadingMemory"]
