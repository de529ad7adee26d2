"""A model of hybrid-model-factory as its definitions say, one token or one dense mask at a time, from its own tensors.

Nothing here imports the package. Definitions: `hybrid_zoo/models/hybrid_qwen3` and `hybrid_zoo/layers` of
awslabs/hybrid-model-factory. float64, one row, no cache.

Shapes: T tokens, E hidden size, H heads, G key/value heads, D head dim, W window.
"""

import torch
from torch.nn import functional as F


def rms(x, weight, eps):
    return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, theta):
    """RoPE at positions 0 ... T - 1 on [T, heads, D], its frequencies in float32 as transformers has them."""
    length, _, dim = x.shape
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.arange(length, dtype=x.dtype)[:, None] * frequencies.to(x.dtype)
    cos, sin = (torch.cat([part, part], -1)[:, None] for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def convolve(rows, weight, bias):
    """SiLU of the causal depthwise convolution of rows [T, C] with a Conv1d's weight [C, 1, K]."""
    taps, out = weight.shape[-1], torch.zeros_like(rows)
    for t in range(len(rows)):
        for j in range(min(taps, t + 1)):
            out[t] += weight[:, 0, taps - 1 - j] * rows[t - j]
    return F.silu(out if bias is None else out + bias)


def softmax_over(query, keys, values, seen):
    """Attention of [T, H, D] on lists of sets; seen [T, T] per set says which of its keys; one softmax over all sets.

    query: one per set. keys, values: [T, G, D] per set.
    """
    repeat = query[0].shape[1] // keys[0].shape[1]
    found = []
    for asking, key, mask in zip(query, keys, seen, strict=True):
        scores = torch.einsum("thd,shd->hts", asking, key.repeat_interleave(repeat, 1)) / asking.shape[-1] ** 0.5
        found.append(scores.masked_fill(~mask, -torch.inf))
    weights = torch.cat(found, -1).softmax(-1)
    every = torch.cat([value.repeat_interleave(repeat, 1) for value in values])
    return torch.einsum("hts,shd->thd", weights, every).flatten(1)


def band(length, first, last):
    """[T, T]: query t sees s iff t - first <= s <= t - last."""
    apart = torch.arange(length)[:, None] - torch.arange(length)
    return (apart <= first) & (apart >= last)


class Reference:
    """config: config.json as a dict. tensors: of the checkpoint, by name."""

    def __init__(self, config, tensors):
        self.config, self.tensors = config, {name: value.double() for name, value in tensors.items()}
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim, self.eps = config["head_dim"], config["rms_norm_eps"]
        self.theta = config["rope_parameters"]["rope_theta"]

    def linear(self, name, x):
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def normed(self, name, x, eps=None):
        return rms(x, self.tensors[f"{name}.weight"], self.eps if eps is None else eps)

    def logits(self, ids):
        """[T, V] of ids [T]."""
        hidden = self.tensors["model.embed_tokens.weight"][ids]
        mixers = {"*": self.full, "SWA": self.sliding, "BMF": self.bmojo, "M2": self.mamba, "GDN": self.gdn}
        mixers["GKA"] = self.gka
        places = {"*": "self_attn", "SWA": "swa", "BMF": "bmojo_f", "M2": "mamba", "GDN": "gdn", "GKA": "gka"}
        for index, token in enumerate(self.config["hybrid_override_pattern"].split("-")):
            layer = f"model.layers.{index}"
            hidden = hidden + mixers[token](f"{layer}.{places[token]}", self.normed(f"{layer}.input_layernorm", hidden))
            x = self.normed(f"{layer}.post_attention_layernorm", hidden)
            gate = F.silu(self.linear(f"{layer}.mlp.gate_proj", x))
            hidden = hidden + self.linear(f"{layer}.mlp.down_proj", gate * self.linear(f"{layer}.mlp.up_proj", x))
        hidden = self.normed("model.norm", hidden)
        tied = self.config.get("tie_word_embeddings", False)
        return hidden @ self.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"].T

    # Attention -------------------------------------------------------------------------------------------------------
    def projected(self, name, which, x, mark=""):
        """Heads of q, k or v; q and k normed and at their positions."""
        out = self.linear(f"{name}.{which}_proj{mark}", x).unflatten(-1, (-1, self.dim))
        return out if which == "v" else rotate(self.normed(f"{name}.{which}_norm{mark}", out), self.theta)

    def attend(self, name, x, first):
        query, key, value = (self.projected(name, which, x) for which in "qkv")
        return self.linear(f"{name}.o_proj", softmax_over([query], [key], [value], [band(len(x), first, 0)]))

    def full(self, name, x):
        return self.attend(name, x, len(x))

    def sliding(self, name, x):
        return self.attend(name, x, self.config["swa_config"]["window_size"] - 1)

    def bmojo(self, name, x):
        """Query i sees inputs [i - W + 1, i] and SSM outputs [i - 2 W + 1, i - W]."""
        section, attention = self.config["bmojo_config"], f"{name}.bmojo_attn"
        size = section["window_size"] + section["window_size"] % 2
        mixer = {"mamba2": ("mamba", self.mamba), "gdn": ("gdn", self.gdn), "gka": ("gka", self.gka)}
        place, mix = mixer[section["ssm_mixer"]]
        fading, mark = mix(f"{name}.{place}", x), "" if section["tie_attn_weights"] else "_"
        query, key, value = (self.projected(attention, which, x) for which in "qkv")
        asking = self.projected(attention, "q", x, mark)
        old_key, old_value = (self.projected(attention, which, fading, mark) for which in "kv")
        seen = band(len(x), size - 1, 0), band(len(x), 2 * size - 1, size)
        return self.linear(
            f"{attention}.o_proj", softmax_over([query, asking], [key, old_key], [value, old_value], seen)
        )

    # SSMs ------------------------------------------------------------------------------------------------------------
    def of_heads(self, shared):
        """[T, G D] as every head has it, [T, H, D]."""
        return shared.unflatten(-1, (self.groups, self.dim)).repeat_interleave(self.heads // self.groups, 1)

    def mamba(self, name, u):
        heads, groups, dim = self.heads, self.groups, self.dim
        sizes = [heads * dim, groups * dim, groups * dim, heads * dim, heads]
        z, x, B, C, dt = self.linear(f"{name}.in_proj", u).split(sizes, -1)
        if self.config["mamba2_config"].get("use_qk_norm", True):
            B, C = (
                self.normed(f"{name}.{which}_norm", each.unflatten(-1, (-1, dim)), 1e-6).flatten(1)
                for which, each in (("B", B), ("C", C))
            )
        mixed = torch.cat([x, B, C], -1)
        mixed = convolve(mixed, self.tensors[f"{name}.conv1d.weight"], self.tensors[f"{name}.conv1d.bias"])
        x, B, C = mixed.split(sizes[1:4], -1)
        x, B, C = self.of_heads(x), self.of_heads(B), C.unflatten(-1, (heads, dim))
        dt = F.softplus(dt + self.tensors[f"{name}.dt_bias"])
        decay = torch.exp(-torch.exp(self.tensors[f"{name}.A_log"]) * dt)
        state, rows = torch.zeros(heads, dim, dim, dtype=u.dtype), []
        for t in range(len(u)):
            written = (dt[t, :, None] * x[t])[:, :, None] * B[t][:, None]
            state = decay[t, :, None, None] * state + written
            rows.append((state @ C[t][:, :, None])[..., 0] + self.tensors[f"{name}.D"][:, None] * x[t])
        y = torch.stack(rows) * F.silu(z).unflatten(-1, (heads, dim))
        y = rms(y, 1.0, 1e-5).flatten(1) * self.tensors[f"{name}.norm.weight"]
        return self.linear(f"{name}.out_proj", y)

    def keys_values(self, name, section, u):
        """Convolved q, k, v, k and v of every head: [T, H, D] each."""
        found = {}
        for which in "qkv":
            bias = self.tensors[f"{name}.{which}_conv1d.bias"] if section.get("conv_bias") else None
            rows = self.linear(f"{name}.{which}_proj", u)
            found[which] = convolve(rows, self.tensors[f"{name}.{which}_conv1d.weight"], bias)
        for which in "kv":
            shared = found[which]
            found[which] = self.of_heads(shared)
            if section.get("kv_proj_rank") is not None:
                if section.get("kv_learnable_residual"):
                    rows = shared.unflatten(-1, (self.groups, self.dim))
                    found[which] = torch.einsum("hg,tgd->thd", self.tensors[f"{name}.{which}_rep"], rows)
                hidden = F.silu(self.linear(f"{name}.proj_{which}.linearA", shared))
                added = self.linear(f"{name}.proj_{which}.linearB", hidden)
                found[which] = found[which] + added.unflatten(-1, (self.heads, self.dim))
        return found["q"].unflatten(-1, (self.heads, self.dim)), found["k"], found["v"]

    def log_decay(self, name, step):
        return -torch.exp(self.tensors[f"{name}.A_log"]) * F.softplus(step + self.tensors[f"{name}.dt_bias"])

    def gated_out(self, name, section, y, u, eps):
        y = self.normed(f"{name}.o_norm", y, eps).flatten(1)
        if section.get("use_gate", True):
            y = y * F.silu(self.linear(f"{name}.g_proj", u))
        return self.linear(f"{name}.o_proj", y)

    def gdn(self, name, u):
        section = self.config["gdn_config"]
        query, key, value = self.keys_values(name, section, u)
        query, key = (each * torch.rsqrt((each**2).sum(-1, keepdim=True) + 1e-6) for each in (query, key))
        beta = torch.sigmoid(self.linear(f"{name}.b_proj", u))
        decay = torch.exp(self.log_decay(name, self.linear(f"{name}.gk_proj", u)))
        state, rows = torch.zeros(self.heads, self.dim, self.dim, dtype=u.dtype), []  # [H, key, value]
        for t in range(len(u)):
            state = decay[t, :, None, None] * state
            known = (state * key[t][:, :, None]).sum(1)
            state = state + key[t][:, :, None] * (beta[t, :, None] * (value[t] - known))[:, None]
            rows.append((state * (query[t] * self.dim**-0.5)[:, :, None]).sum(1))
        return self.gated_out(name, section, torch.stack(rows), u, section.get("norm_eps", 1e-5))

    def gka(self, name, u):
        section = self.config["gka_config"]
        query, key, value = self.keys_values(name, section, u)
        query, key = (each / (torch.linalg.vector_norm(each, dim=-1, keepdim=True) + 1e-6) for each in (query, key))
        share = torch.sigmoid(self.linear(f"{name}.b_proj", u)) + 1e-6
        key, value = (share[..., None] * each for each in (key, value))
        mix = torch.sigmoid(self.linear(f"{name}.alpha_proj", u))
        decay = torch.exp(self.log_decay(name, self.linear(f"{name}.a_proj", u)))
        covariance, state = (torch.zeros(self.heads, self.dim, self.dim, dtype=u.dtype) for _ in range(2))
        rows = []
        for t in range(len(u)):
            forget = decay[t, :, None, None]
            covariance = forget * covariance + key[t][:, :, None] * key[t][:, None]
            state = forget * state + key[t][:, :, None] * value[t][:, None]
            steps, ridge = section.get("num_iter", 30), section.get("ridge_strength", 0.02)
            found = torch.stack([chebyshev(covariance[h], query[t, h], ridge, steps) for h in range(self.heads)])
            asking = query[t] + mix[t, :, None] * (found - query[t])
            rows.append((state * (asking * self.dim**-0.5)[:, :, None]).sum(1))
        return self.gated_out(name, section, torch.stack(rows), u, section.get("norm_eps", 1e-6))


def chebyshev(covariance, query, ridge, steps):
    """x with (covariance + ridge F) x = query, F its Frobenius norm, by so many steps of Chebyshev's iteration."""
    size = covariance.norm()
    ridge = ridge * size
    step, rho = 2 / (2 * ridge + size), size / (2 * ridge + size)
    before, x, omega = torch.zeros_like(query), step * query, 2.0
    for _ in range(steps):
        omega = 1 / (1 - rho**2 * omega / 4)
        error = covariance @ x + ridge * x - query
        before, x = x, omega * (x - step * error) + (1 - omega) * before
    return x
