"""Definitions of B'MOJO as loops over single tokens: what every fast form in the package is judged against.

Written from the paper's Algorithm 1 (arXiv 2407.06324), Mamba-2 (2405.21060) and Mamba (2312.00752), not from the
package: nothing here imports `modeling_bmojo`. One row at a time, no padding, any dtype, gradients by autograd.

Shapes: T tokens, E width of an SSM output, H query heads, G key/value heads (SSM groups for B and C), D head dim,
P SSM head dim, I channels of S6, N SSM state dim, W window (the query itself included), M eidetic slots, F fading
tokens.
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers.activations import ACT2FN


INNOVATION_EPS = 1e-12


@torch.no_grad()
def randomize_(model, seed=0):
    """Random values in every parameter (biases and norms too: at their initial 0 and 1 a test would not see them)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("conv.weight") or "conv1d.weight" in name:
            value = noise / 2
        elif parameter.dim() > 1:
            value = noise if "embed" in name else noise / math.sqrt(parameter.shape[-1])
        else:
            value = noise / 5 + (1.0 if "norm" in name else 0.0)
        parameter.copy_(value)
    return model


# The selective state space model -------------------------------------------------------------------------------------
def oracle_ssd_token(state, x, dt, A, B, C, D=None):
    """S = exp(dt A) S + dt x B^T, y = S C + D x, for one token. state [H, P, N], x [H, P], dt [H], B and C [G, N]."""
    heads_per_group = x.shape[0] // B.shape[0]
    states, outputs = [], []
    for h in range(x.shape[0]):
        group = h // heads_per_group
        new = torch.exp(dt[h] * A[h]) * state[h] + dt[h] * torch.outer(x[h], B[group])
        out = new @ C[group]
        states.append(new)
        outputs.append(out if D is None else out + D[h] * x[h])
    return torch.stack(states), torch.stack(outputs)


def oracle_ssd(x, dt, A, B, C, D=None, initial_state=None):
    """`oracle_ssd_token` over rows and tokens: x [B, T, H, P] -> (y [B, T, H, P], state [B, H, P, N])."""
    rows, finals = [], []
    for b in range(x.shape[0]):
        state = x.new_zeros(x.shape[2], x.shape[3], B.shape[-1]) if initial_state is None else initial_state[b]
        outputs = []
        for t in range(x.shape[1]):
            state, y = oracle_ssd_token(state, x[b, t], dt[b, t], A, B[b, t], C[b, t], D)
            outputs.append(y)
        rows.append(torch.stack(outputs) if outputs else x[b])
        finals.append(state)
    return torch.stack(rows), torch.stack(finals)


def oracle_s6_token(state, x, dt, A, B, C, D=None):
    """S[i] = exp(dt[i] A[i]) S[i] + dt[i] x[i] B, y[i] = S[i] . C + D[i] x[i]; state, A [I, N], x, dt [I], B, C [N]."""
    states, outputs = [], []
    for i in range(x.shape[0]):
        new = torch.exp(dt[i] * A[i]) * state[i] + dt[i] * x[i] * B
        out = (new * C).sum()
        states.append(new)
        outputs.append(out if D is None else out + D[i] * x[i])
    return torch.stack(states), torch.stack(outputs)


def oracle_s6(x, dt, A, B, C, D=None, initial_state=None):
    """`oracle_s6_token` over rows and tokens: x [B, T, I] -> (y [B, T, I], state [B, I, N])."""
    rows, finals = [], []
    for b in range(x.shape[0]):
        state = torch.zeros_like(A) if initial_state is None else initial_state[b]
        outputs = []
        for t in range(x.shape[1]):
            state, y = oracle_s6_token(state, x[b, t], dt[b, t], A, B[b, t], C[b, t], D)
            outputs.append(y)
        rows.append(torch.stack(outputs) if outputs else x[b])
        finals.append(state)
    return torch.stack(rows), torch.stack(finals)


def oracle_delta_token(state, x, log_decay, beta, B, C):
    """The gated delta rule (arXiv 2412.06464): S <- g S (I - beta B B^T) + beta x B^T, y = S C, head by head.

    state [H, P, N], x [H, P], log_decay, beta [H], B, C [G, N]. Written with the matrix of the paper's equation 10, not
    with the difference that the package forms.
    """
    heads, repeat = x.shape[0], x.shape[0] // B.shape[0]
    states, outputs = [], []
    for h in range(heads):
        key, query = B[h // repeat], C[h // repeat]
        turned = torch.eye(len(key), dtype=key.dtype) - beta[h] * torch.outer(key, key)
        states.append(torch.exp(log_decay[h]) * state[h] @ turned + beta[h] * torch.outer(x[h], key))
        outputs.append(states[-1] @ query)
    return torch.stack(states), torch.stack(outputs)


def oracle_delta(x, log_decay, beta, B, C, initial_state=None):
    """`oracle_delta_token` over rows and tokens: x [B, T, H, P] -> (y [B, T, H, P], state [B, H, P, N])."""
    rows, finals = [], []
    for b in range(x.shape[0]):
        state = x.new_zeros(*x.shape[2:], B.shape[3]) if initial_state is None else initial_state[b]
        outputs = []
        for t in range(x.shape[1]):
            state, y = oracle_delta_token(state, x[b, t], log_decay[b, t], beta[b, t], B[b, t], C[b, t])
            outputs.append(y)
        rows.append(torch.stack(outputs) if outputs else x[b])
        finals.append(state)
    return torch.stack(rows), torch.stack(finals)


def chebyshev_solution(H, q, steps, ridge):
    """x of (H + lambda I) x = q after `steps` steps (hybrid-model-factory's listing); lambda = ridge |H|_F, and the
    eigenvalues of H lie between 0 and |H|_F. Nothing was written: zeros."""
    size = torch.sqrt((H * H).sum())
    if size == 0:
        return torch.zeros_like(q)
    penalty = ridge * size
    stride, rho = 2 / (2 * penalty + size), size / (2 * penalty + size)
    previous, x, omega = torch.zeros_like(q), stride * q, 2.0
    for _ in range(steps):
        omega = 1 / (1 - rho * rho * omega / 4)
        previous, x = x, omega * (x - stride * (H @ x + penalty * x - q)) + (1 - omega) * previous
    return x


def oracle_kalma_token(state, x, log_decay, mix, B, C, steps=30, ridge=0.02):
    """Gated KalmaNet (arXiv 2511.21016), head by head: U <- g U + x B^T, H <- g H + B B^T, y = U (C + a (z - C)).

    state [heads, P + N, N] is U above H, x [heads, P], log_decay, mix [heads], B, C [heads, N].
    """
    states, outputs = [], []
    for h in range(len(x)):
        U, H = state[h, : x.shape[1]], state[h, x.shape[1] :]
        U = torch.exp(log_decay[h]) * U + torch.outer(x[h], B[h])
        H = torch.exp(log_decay[h]) * H + torch.outer(B[h], B[h])
        z = chebyshev_solution(H, C[h], steps, ridge)
        outputs.append(U @ (C[h] + mix[h] * (z - C[h])))
        states.append(torch.cat([U, H]))
    return torch.stack(states), torch.stack(outputs)


def oracle_kalma(x, log_decay, mix, B, C, initial_state=None, steps=30, ridge=0.02):
    """`oracle_kalma_token` over rows and tokens: x [B, T, H, P] -> (y [B, T, H, P], state [B, H, P + N, N])."""
    rows, finals = [], []
    for b in range(x.shape[0]):
        empty = x.new_zeros(x.shape[2], x.shape[3] + B.shape[3], B.shape[3])
        state, outputs = empty if initial_state is None else initial_state[b], []
        for t in range(x.shape[1]):
            given = (value[b, t] for value in (x, log_decay, mix, B, C))
            state, y = oracle_kalma_token(state, *given, steps, ridge)
            outputs.append(y)
        rows.append(torch.stack(outputs) if outputs else x[b])
        finals.append(state)
    return torch.stack(rows), torch.stack(finals)


# Innovation ----------------------------------------------------------------------------------------------------------
def scale_free_error(value, prediction, eps=INNOVATION_EPS):
    """sum (y - y_hat)^2 / (sum y^2 + sum y_hat^2 + eps), over everything."""
    return ((value - prediction) ** 2).sum() / ((value**2).sum() + (prediction**2).sum() + eps)


def oracle_key_innovation(keys, eps=INNOVATION_EPS):
    """[T] from keys [T, G, D]: the error of each head's key against the mean of all before it, averaged over heads."""
    errors = []
    for t in range(len(keys)):
        error = 0.0
        for head in range(keys.shape[1]):
            prediction = torch.zeros_like(keys[t, head])
            for past in keys[:t, head]:
                prediction = prediction + past / t
            error = error + scale_free_error(keys[t, head], prediction, eps) / keys.shape[1]
        errors.append(error)
    return torch.stack(errors)


def oracle_output_innovation(outputs, taps, eps=INNOVATION_EPS):
    """e_t of y_t against the mean of y_{t-1..t-k}, zeros before the first token. [T, E] -> [T]."""
    errors = []
    for t in range(len(outputs)):
        prediction = torch.zeros_like(outputs[t])
        for j in range(1, taps + 1):
            if t - j >= 0:
                prediction = prediction + outputs[t - j] / taps
        errors.append(scale_free_error(outputs[t], prediction, eps))
    return torch.stack(errors)


def oracle_state_prediction(state, dt, A, B):
    """x_hat_t = (a_t S_{t-1}) B_t: the decayed state before the write, read with the write key. [H, P]."""
    heads_per_group = state.shape[0] // B.shape[0]
    return torch.stack([torch.exp(dt[h] * A[h]) * state[h] @ B[h // heads_per_group] for h in range(state.shape[0])])


def oracle_state_innovation(x, dt, A, B, initial_state=None, eps=INNOVATION_EPS):
    """e_t of x_t against `oracle_state_prediction`, over all heads. x [B, T, H, P] -> [B, T]."""
    rows = []
    for b in range(x.shape[0]):
        state = x.new_zeros(x.shape[2], x.shape[3], B.shape[-1]) if initial_state is None else initial_state[b]
        errors = []
        for t in range(x.shape[1]):
            errors.append(scale_free_error(x[b, t], oracle_state_prediction(state, dt[b, t], A, B[b, t]), eps))
            state, _ = oracle_ssd_token(state, x[b, t], dt[b, t], A, B[b, t], B[b, t])
        rows.append(torch.stack(errors))
    return torch.stack(rows)


def oracle_s6_prediction(state, dt, A, B):
    """The same for S6: x_hat[i] = (exp(dt[i] A[i]) S[i]) . B, from the state before the write. [I]."""
    return torch.stack([(torch.exp(dt[i] * A[i]) * state[i] * B).sum() for i in range(dt.shape[0])])


# Eidetic memory ------------------------------------------------------------------------------------------------------
@dataclass
class EideticMemory:
    """At most M tokens; a token enters on leaving the window if there is room or it beats the smallest score.

    The score of token s at time t is e_s * exp(-g (t - s)), evaluated for every comparison. Ties: the older stays.
    """

    slots: int
    decay: float
    tokens: list = field(default_factory=list)  # (position, innovation, payload)

    def admit(self, now, position, innovation, payload=None):
        """Offer one token to the memory at time `now`; returns the position that was let go, or None."""
        self.tokens.append((position, float(innovation), payload))
        if len(self.tokens) <= self.slots:
            return None
        # The smallest score leaves; among equal scores the youngest does.
        loser = min(self.tokens, key=lambda token: (self.score(token, now), -token[0]))
        self.tokens.remove(loser)
        return loser[0]

    def score(self, token, now):
        return token[1] * math.exp(-self.decay * (now - token[0]))

    def positions(self):
        return frozenset(token[0] for token in self.tokens)


def oracle_eidetic(innovations, window, slots, decay=0.0):
    """The set of remembered positions after each token, and the time at which each token is last seen plus one.

    Time runs on for W queries after the last token, until every token has left the window. Returns (sets, expiry):
    sets[t] holds what query t sees beyond its window; expiry[s] is the first t at which query t no longer sees token s,
    inf where there is none.
    """
    memory = EideticMemory(slots, decay)
    sets, expiry = [], [math.inf] * len(innovations)
    for t in range(len(innovations) + window):
        leaving = t - window
        if leaving >= 0:
            gone = memory.admit(t, leaving, innovations[leaving])
            if gone is not None:
                expiry[gone] = t
        sets.append(memory.positions())
    return sets, expiry


# Attention -----------------------------------------------------------------------------------------------------------
def rotate(x, position, theta, dtype=None):
    """RoPE of x [heads, D] at one position, Llama's half-split layout; inverse frequencies of `dtype` (None: x's)."""
    dim = x.shape[-1]
    exponent = torch.arange(0, dim, 2).to(dtype or x.dtype) / dim
    angle = position * (1.0 / theta**exponent).to(x.dtype)
    cos, sin = torch.cos(angle), torch.sin(angle)
    first, second = x[:, : dim // 2], x[:, dim // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(query, keys, values, others=0, other=None):
    """One softmax of one query [H, D] over lists of keys and values [G, D]; head h reads group h // (H / G).

    The last `others` keys are asked by the query `other` instead, if there is one.
    """
    per_group = query.shape[0] // keys[0].shape[0]
    outputs = []
    for h in range(query.shape[0]):
        k = torch.stack([key[h // per_group] for key in keys])
        v = torch.stack([value[h // per_group] for value in values])
        scores = k @ query[h]
        if other is not None and others:
            scores = torch.cat([scores[:-others], k[-others:] @ other[h]])
        weights = torch.softmax(scores / math.sqrt(query.shape[-1]), dim=0)
        outputs.append(weights @ v)
    return torch.stack(outputs)


def oracle_gathered_attention(query, keys, values, begin, end, index, block, scaling):
    """One softmax per query over the columns of its block whose key it may see; zeros where it sees none.

    query [B, T, H, D], keys and values [B, S, G, D], begin and end [B, S], index [B, n, K] with -1 for none.
    """
    repeat = query.shape[2] // keys.shape[2]
    rows = []
    for b in range(query.shape[0]):
        outputs = []
        for t in range(query.shape[1]):
            columns = [i for i in index[b, t // block].tolist() if i >= 0 and begin[b, i] <= t < end[b, i]]
            if not columns:
                outputs.append(torch.zeros_like(query[b, t]))
                continue
            k, v = (side[b, columns].repeat_interleave(repeat, dim=1) for side in (keys, values))
            weights = torch.softmax(torch.einsum("hd,khd->hk", query[b, t], k) * scaling, dim=-1)
            outputs.append(torch.einsum("hk,khd->hd", weights, v))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def bmojo_f_dense(query, keys, values, fading_keys, fading_values, window):
    """B'MOJO-F as HMF defines it: one explicit [T, 2T] mask, query i sees inputs [i-W+1, i], SSM outputs [i-2W+1, i-W].

    query [T, H, D]; keys, values, fading_keys, fading_values [T, G, D] -> [T, H, D].
    """
    length, heads, dim = query.shape
    mask = torch.zeros(length, 2 * length, dtype=torch.bool)
    for i in range(length):
        for s in range(max(0, i - window + 1), i + 1):
            mask[i, s] = True
        for s in range(max(0, i - 2 * window + 1), i - window + 1):
            mask[i, length + s] = True
    k = torch.cat([keys, fading_keys]).repeat_interleave(heads // keys.shape[1], dim=1)
    v = torch.cat([values, fading_values]).repeat_interleave(heads // keys.shape[1], dim=1)
    scores = torch.einsum("thd,shd->hts", query, k) / math.sqrt(dim)
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
    return torch.einsum("hts,shd->thd", weights, v)


# Algorithm 1, the whole model ----------------------------------------------------------------------------------------
def rms_norm(x, weight, eps):
    return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + eps) * weight


@dataclass
class LayerState:
    """What one layer carries from token to token, as plain lists that grow without bound."""

    inputs: list = field(default_factory=list)  # (key, value) of every input
    fading: list = field(default_factory=list)  # (position, key, value) of every SSM output at s - 1, 2 s - 1, ...
    outputs: list = field(default_factory=list)  # every SSM output, hidden space
    bare_keys: list = field(default_factory=list)  # every key without its position
    innovations: list = field(default_factory=list)
    convolved: list = field(default_factory=list)  # every x|B|C before the conv
    state: torch.Tensor | None = None
    eidetic: EideticMemory | None = None
    remembered: list = field(default_factory=list)


class Algorithm1:
    """One unpadded row through every layer of a B'MOJO language model, one token at a time."""

    def __init__(self, config, tensors, rope_dtype=None):
        self.config, self.tensors, self.rope_dtype = config, tensors, rope_dtype
        self.dtype = tensors["model.embed_tokens.weight"].dtype
        self.layers = [
            LayerState(eidetic=EideticMemory(config.eidetic_size, config.eidetic_decay)) for _ in config.layer_types
        ]

    def linear(self, name, x):
        return functional.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def step(self, token, t):
        """Logits [V] of the token at position t."""
        config = self.config
        hidden = self.tensors["model.embed_tokens.weight"][token] * config.embedding_multiplier
        for i, layer_type in enumerate(config.layer_types):
            name, layer = f"model.layers.{i}", self.layers[i]
            u = self.normed(f"{name}.input_layernorm", hidden, "pre")
            if layer_type in ("bmojo", "linear_attention"):
                layer.outputs.append(self.fading_output(f"{name}.fading", u, layer))
            mixed = layer.outputs[-1] if layer_type == "linear_attention" else self.attention(i, layer_type, u, t)
            mixed = self.normed(f"{name}.post_attention_layernorm", mixed, "post")
            hidden = hidden + config.residual_multiplier * mixed
            layer.remembered.append(layer.eidetic.positions())
            if config.intermediate_size:
                hidden = hidden + config.residual_multiplier * self.mlp(name, hidden)
        hidden = rms_norm(hidden, self.tensors["model.norm.weight"], config.rms_norm_eps)
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        return functional.linear(hidden, self.tensors[head]) / config.logits_scaling

    def normed(self, name, x, position):
        """x normalised where the norms stand at `position`, else x itself."""
        if self.config.norm_position != position:
            return x
        return rms_norm(x, self.tensors[f"{name}.weight"], self.config.rms_norm_eps)

    def mlp(self, name, hidden):
        x = self.normed(f"{name}.post_attention_layernorm", hidden, "pre")
        gate = ACT2FN[self.config.hidden_act](self.linear(f"{name}.mlp.gate_proj", x))
        out = self.linear(f"{name}.mlp.down_proj", gate * self.linear(f"{name}.mlp.up_proj", x))
        return self.normed(f"{name}.post_feedforward_layernorm", out, "post")

    def fading_output(self, name, u, layer):
        """Steps 2 and 3: y_t in hidden space, and e_t appended to the layer's innovations."""
        config = self.config
        eps = config.rms_norm_eps if config.ssm_norm_eps is None else config.ssm_norm_eps
        forms = {"mamba2": self.mamba2, "mamba": self.s6, "gated_delta": self.gated_delta, "kalmanet": self.kalmanet}
        x, z, y, prediction = forms[config.ssm_type](name, u, layer)
        normed = config.ssm_norm and config.ssm_type not in ("gated_delta", "kalmanet")
        if config.ssm_norm and not normed:
            y = rms_norm(y, self.tensors[f"{name}.norm.weight"], eps)
        y = y.reshape(-1)
        if config.ssm_gated:
            y = y * z * torch.sigmoid(z)
        if normed:
            groups = config.ssm_num_heads if config.ssm_head_pattern == "multi_query" else config.ssm_num_groups
            grouped = rms_norm(y.view(groups, -1), 1.0, eps).reshape(-1)
            y = grouped * self.tensors[f"{name}.norm.weight"]
        if config.ssm_projected:
            y = self.linear(f"{name}.out_proj", y)
        if config.innovation == "key":
            return y  # judged where its key is made
        if config.innovation == "state":
            error = scale_free_error(x, prediction)
        else:
            error = oracle_output_innovation(layer.outputs[-config.innovation_taps :] + [y], config.innovation_taps)[-1]
        layer.innovations.append(self.learnt(error))
        return y

    def learnt(self, value):
        """value, with its gradient where the innovation test has one."""
        return value if self.config.innovation_gradient else value.detach()

    def scalars(self, name):
        """A, the bias of the time step, and D, in the model's dtype."""
        A_log, bias, D = (self.tensors[f"{name}.scalars.{key}"].to(self.dtype) for key in ("A_log", "dt_bias", "D"))
        return -torch.exp(A_log), bias, D

    def time_step(self, raw):
        """softplus, clamped."""
        return torch.clamp(torch.log1p(torch.exp(raw)), *self.config.ssm_time_step_limit)

    def mamba2(self, name, u, layer):
        """x, z, y before the gate, the state's prediction of x; z|x|B|C|dt from one projection, conv over x|B|C."""
        config = self.config
        heads, width, size = config.ssm_num_heads, config.ssm_head_dim, config.ssm_state_size
        groups, inner = config.ssm_num_groups, config.ssm_num_heads * config.ssm_head_dim
        inputs, queries = (groups, heads) if config.ssm_head_pattern == "multi_query" else (heads, groups)
        projected = self.linear(f"{name}.in_proj", u)
        sizes = [inputs * width if config.ssm_projected else 0, groups * size, queries * size]
        z, x, B, C, dt = torch.split(projected, [inner if config.ssm_gated else 0, *sizes, heads])
        if config.ssm_qk_norm:
            B = rms_norm(B.view(groups, size), self.tensors[f"{name}.B_norm.weight"], 1e-6).reshape(-1)
            C = rms_norm(C.view(queries, size), self.tensors[f"{name}.C_norm.weight"], 1e-6).reshape(-1)
        layer.convolved.append(torch.cat([x if config.ssm_projected else u, B, C]))
        x, B, C = torch.split(self.convolve(name, layer.convolved), [inputs * width, groups * size, queries * size])
        x, B, C = x.view(inputs, width), B.view(groups, size), C.view(queries, size)
        if config.ssm_head_pattern == "multi_query":
            x, B = (torch.stack([value[h // (heads // groups)] for h in range(heads)]) for value in (x, B))
        A, bias, D = self.scalars(name)
        dt = self.time_step(dt + bias)
        if layer.state is None:
            layer.state = x.new_zeros(heads, width, size)
        prediction = oracle_state_prediction(layer.state, dt, A, B)
        layer.state, y = oracle_ssd_token(layer.state, x, dt, A, B, C, D)
        return x, z, y, prediction

    def s6(self, name, u, layer):
        """The same for S6: x|z from one projection, conv over x, then dt|B|C from the convolved x."""
        config = self.config
        inner, size = config.ssm_num_heads * config.ssm_head_dim, config.ssm_state_size
        projected = self.linear(f"{name}.in_proj", u)
        raw, z = projected[:inner], projected[inner:]
        layer.convolved.append(raw)
        x = self.convolve(name, layer.convolved)
        low_rank, B, C = torch.split(self.linear(f"{name}.x_proj", x), [config.ssm_time_step_rank, size, size])
        A, bias, D = self.scalars(name)
        dt = self.time_step(self.linear(f"{name}.dt_proj", low_rank) + bias)
        if layer.state is None:
            layer.state = torch.zeros_like(A)
        prediction = oracle_s6_prediction(layer.state, dt, A, B)
        layer.state, y = oracle_s6_token(layer.state, x, dt, A, B, C, D)
        return x, z, y, prediction

    def gated_delta(self, name, u, layer):
        """The same for the gated delta rule: z|x|B|C|dt|b from one projection, conv over x|B|C, keys of length 1."""
        config = self.config
        heads, width, size = config.ssm_num_heads, config.ssm_head_dim, config.ssm_state_size
        groups, inner = config.ssm_num_groups, config.ssm_num_heads * config.ssm_head_dim
        inputs, queries = (groups, heads) if config.ssm_head_pattern == "multi_query" else (heads, groups)
        parts = [inputs * width, groups * size, queries * size]
        sizes = [inner if config.ssm_gated else 0, sum(parts), heads, heads]
        z, mixed, dt, b = torch.split(self.linear(f"{name}.in_proj", u), sizes)
        layer.convolved.append(mixed)
        x, B, C = torch.split(self.convolve(name, layer.convolved), parts)
        x, B, C = x.view(inputs, width), B.view(groups, size), C.view(queries, size)
        if config.ssm_head_pattern == "multi_query":
            pairs = ("values", x), ("keys", B)
            x, B = (self.for_heads(f"{name}.{which}", each.reshape(-1)) for which, each in pairs)
            groups = heads
        B, C = (keys / torch.sqrt((keys**2).sum(-1, keepdim=True) + 1e-6) for keys in (B, C))
        A_log, bias = (self.tensors[f"{name}.scalars.{key}"].to(self.dtype) for key in ("A_log", "dt_bias"))
        log_decay, beta = -torch.exp(A_log) * self.time_step(dt + bias), 1 / (1 + torch.exp(-b))
        if layer.state is None:
            layer.state = x.new_zeros(heads, width, size)
        decayed = torch.exp(log_decay)[:, None, None] * layer.state
        prediction = torch.stack([decayed[h] @ B[h // (heads // groups)] for h in range(heads)]).reshape(-1)
        layer.state, y = oracle_delta_token(layer.state, x, log_decay, beta, B, C / math.sqrt(size))
        return x.reshape(-1), z, y, prediction

    def kalmanet(self, name, u, layer):
        """The same for Gated KalmaNet: z|x|B|C|a|b|m from one projection; x and B of groups, C of heads."""
        config = self.config
        heads, width, size = config.ssm_num_heads, config.ssm_head_dim, config.ssm_state_size
        groups, inner = config.ssm_num_groups, config.ssm_num_heads * config.ssm_head_dim
        wide, long, all_long = groups * width, groups * size, heads * size
        sizes = [inner if config.ssm_gated else 0, wide + long + all_long, heads, heads, heads]
        z, mixed, dt, b, m = torch.split(self.linear(f"{name}.in_proj", u), sizes)
        layer.convolved.append(mixed)
        x, B, C = torch.split(self.convolve(name, layer.convolved), [wide, long, all_long])
        x, B = self.for_heads(f"{name}.values", x), self.for_heads(f"{name}.keys", B)
        B, C = (keys / (torch.sqrt((keys**2).sum(-1, keepdim=True)) + 1e-6) for keys in (B, C.view(heads, size)))
        keys = ("A_log", "dt_bias", "share_bias", "mix_bias")
        A_log, bias, b_bias, m_bias = (self.tensors[f"{name}.scalars.{key}"].to(self.dtype) for key in keys)
        log_decay = -torch.exp(A_log) * self.time_step(dt + bias)
        share, mix = 1 / (1 + torch.exp(-b - b_bias)) + 1e-6, 1 / (1 + torch.exp(-m - m_bias))
        if layer.state is None:
            layer.state = x.new_zeros(heads, width + size, size)
        rule = config.ssm_solver_steps, config.ssm_ridge
        said = [S[:width] @ chebyshev_solution(S[width:], key, *rule) for S, key in zip(layer.state, B)]
        written = share[:, None] * x, log_decay, mix, share[:, None] * B, C / math.sqrt(size)
        layer.state, y = oracle_kalma_token(layer.state, *written, *rule)
        return x.reshape(-1), z, y, torch.cat(said)

    def for_heads(self, name, grouped):
        """Values or keys [H, channels] of every head from those of the groups; with a rank, also maps of its own."""
        heads, groups = self.config.ssm_num_heads, self.config.ssm_num_groups
        by_group = grouped.view(groups, -1)
        if self.config.ssm_expand_rank is None:
            return torch.stack([by_group[h // (heads // groups)] for h in range(heads)])
        low = self.linear(f"{name}_down", grouped)
        own = self.linear(f"{name}_up", low / (1 + torch.exp(-low))).view(heads, -1)
        return own + self.tensors[f"{name}_repeat"] @ by_group

    def convolve(self, name, rows):
        """The causal depthwise conv at the last of `rows`; tap K-1 multiplies the current token."""
        weight = self.tensors[f"{name}.conv.weight"]
        taps = weight.shape[-1]
        out = torch.zeros_like(rows[-1])
        for j in range(min(taps, len(rows))):
            out = out + weight[:, taps - 1 - j] * rows[-1 - j]
        if f"{name}.conv.bias" in self.tensors:
            out = out + self.tensors[f"{name}.conv.bias"]
        return ACT2FN[self.config.ssm_conv_act](out)

    def bare_heads(self, name, x, count, norm):
        """x projected to [count, D]; with `norm` also q/k-norm."""
        config = self.config
        out = self.linear(name, x)
        if norm is not None and config.qk_norm == "full":
            out = rms_norm(out, self.tensors[norm], config.rms_norm_eps)
        out = out.view(count, config.head_dim)
        if norm is not None and config.qk_norm == "head":
            out = rms_norm(out, self.tensors[norm], config.rms_norm_eps)
        return out

    def heads(self, name, x, count, norm, layer_index, position):
        """x projected to [count, D]; with `norm` also q/k-norm and RoPE at the token's own position."""
        config = self.config
        out = self.bare_heads(name, x, count, norm)
        if norm is None:
            return out
        rope = config.rope_parameters is not None
        if config.no_rope_layers is not None:
            rope = rope and bool(config.no_rope_layers[layer_index])
        return rotate(out, position, config.rope_parameters["rope_theta"], self.rope_dtype) if rope else out

    def attention(self, i, layer_type, u, t):
        """Steps 1, 4 and 5 for the token at position t."""
        config, layer, name = self.config, self.layers[i], f"model.layers.{i}.self_attn"
        pairs, k_norm = config.num_key_value_heads, f"{name}.k_norm.weight"
        query = self.heads(f"{name}.q_proj", u, config.num_attention_heads, f"{name}.q_norm.weight", i, t)
        key = self.heads(f"{name}.k_proj", u, pairs, k_norm, i, t)
        layer.bare_keys.append(self.learnt(self.bare_heads(f"{name}.k_proj", u, pairs, k_norm)))
        if config.innovation == "key":
            layer.innovations.append(oracle_key_innovation(torch.stack(layer.bare_keys))[-1])
        layer.inputs.append((key, self.heads(f"{name}.v_proj", u, pairs, None, i, t)))

        other, others, kept = None, 0, []
        window = t + 1 if layer_type == "full_attention" else config.window_size
        seen = list(layer.inputs[max(0, t - window + 1) :])
        if layer_type == "bmojo":
            leaving = t - window
            if leaving >= 0:
                layer.eidetic.admit(t, leaving, layer.innovations[leaving].detach(), layer.inputs[leaving])
            seen += [payload for _, _, payload in layer.eidetic.tokens]
            kept = [layer.innovations[position] for position, _, _ in layer.eidetic.tokens]
            if config.fading_size:
                prefix = "" if config.tie_fading_projections else "fading_"
                y, fading_norm = layer.outputs[t], k_norm
                if not config.tie_fading_queries:
                    fading_norm, own = f"{name}.fading_k_norm.weight", f"{name}.fading_q_norm.weight"
                    other = self.heads(f"{name}.fading_q_proj", u, config.num_attention_heads, own, i, t)
                fading_key = self.heads(f"{name}.{prefix}k_proj", y, pairs, fading_norm, i, t)
                if (t + 1) % config.fading_stride == 0:
                    fading_value = self.heads(f"{name}.{prefix}v_proj", y, pairs, None, i, t)
                    layer.fading.append((t, fading_key, fading_value))
                delay = window if config.fading_delay is None else config.fading_delay
                shown = [(key, value) for s, key, value in layer.fading if s <= t - delay][-config.fading_size :]
                others = len(shown)
                seen += shown
        if config.attention_multiplier is not None:
            query = query * config.attention_multiplier * config.head_dim**0.5  # attend divides by the root
        values = [value for _, value in seen]
        for place, error in enumerate(kept, start=len(seen) - others - len(kept)):
            # A kept token's innovation gets the gradient of a factor of its value, which is one.
            values[place] = values[place] * (1 + config.innovation_gradient * (error - error.detach()))
        out = attend(query, [key for key, _ in seen], values, others, other)
        return self.linear(f"{name}.o_proj", out.reshape(-1))


def algorithm1_forward(model, input_ids, tensors=None, rope_dtype=None, dtype=torch.float64):
    """Logits [T, V] of one unpadded row `input_ids` [T], and per layer the remembered positions after each token.

    `tensors` replaces the model's state dict (leaves that require a gradient, for instance).
    """
    if tensors is None:
        tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    loop = Algorithm1(model.config, tensors, rope_dtype)
    logits = [loop.step(token, t) for t, token in enumerate(torch.as_tensor(input_ids).tolist())]
    return torch.stack(logits), [layer.remembered for layer in loop.layers]
