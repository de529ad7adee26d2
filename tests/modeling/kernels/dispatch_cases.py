"""Inputs and oracles of every operation that the dispatch knows, and what its tests share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_bmojo import BMojoConfig, BMojoForCausalLM, dispatch_bmojo, kernels_cuda, kernels_hub
from modeling_bmojo.dispatch_bmojo import (
    ENVIRONMENT,
    TORCH,
    TRITON,
    Situation,
    choose,
)
from modeling_bmojo.kernels_cuda import KERNELS
from modeling_bmojo.memory_ops import NEVER
from tests.modeling.kernels.kernel_stubs import FUNCTIONS, LAYERS, oracle_s6
from tests.modeling.test_attention_ops import SCALING, generator, one_by_one, three_sets
from tests.oracles import oracle_delta, oracle_eidetic, oracle_kalma, oracle_output_innovation, oracle_ssd, randomize_
from tests.tiny import MIXED_LAYERS, SIZES, VOCAB


EXACT = dict(rtol=1e-10, atol=1e-10)
FP32 = dict(rtol=1e-5, atol=1e-5)


def registered() -> list:
    """(operation, backend, form) of everything there is: what is added to a table is tested here."""
    forms = [(op, "torch", form) for op, form in TORCH.items()]
    for op, kernel in KERNELS.items():
        forms.append((op, "cuda", kernel.form(FUNCTIONS[kernel.name])))
        forms.append((op, "hub", kernels_hub.hub_form(op, LAYERS[kernel.name]()).call))
    forms += [(op, "triton", form.call) for op, form in TRITON.items()]
    return [pytest.param(*entry, id="-".join(entry[:2])) for entry in forms]


def draw(seed):
    rng = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)


def conv_case(tokens, batch, started, seed):
    """x, weight, bias, history and the sum over taps."""
    normal, channels, taps = draw(seed), 16, 4
    inputs = [normal(batch, tokens, channels), normal(channels, taps), normal(channels)]
    inputs.append(normal(batch, taps - 1, channels) if started else None)

    def oracle(x, weight, bias, history):
        past = x.new_zeros(batch, taps - 1, channels) if history is None else history
        line = torch.cat([past, x], dim=1)
        rows = [(line[:, t : t + taps] * weight.T).sum(1) + bias for t in range(tokens)]
        return torch.stack(rows, dim=1) if rows else x

    return inputs, oracle


def scan_case(tokens, batch, started, seed):
    normal, heads, groups, channels, width = draw(seed), 4, 2, 3, 5
    dt = torch.nn.functional.softplus(normal(batch, tokens, heads) - 1)
    inputs = [normal(batch, tokens, heads, channels), dt, -torch.exp(normal(heads))]
    inputs += [normal(batch, tokens, groups, width), normal(batch, tokens, groups, width)]
    inputs += [normal(heads) if seed % 2 else None, normal(batch, heads, channels, width) if started else None]
    return inputs, oracle_ssd


def s6_case(tokens, batch, started, seed):
    normal, inner, width = draw(seed), 6, 5
    dt = torch.nn.functional.softplus(normal(batch, tokens, inner) - 1)
    inputs = [normal(batch, tokens, inner), dt, -torch.exp(normal(inner, width))]
    inputs += [normal(batch, tokens, width), normal(batch, tokens, width)]
    inputs += [normal(inner) if seed % 2 else None, normal(batch, inner, width) if started else None]
    return inputs, oracle_s6


def delta_case(tokens, batch, started, seed):
    normal, heads, groups, channels, width = draw(seed), 4, 2, 3, 5
    log_decay = -torch.nn.functional.softplus(normal(batch, tokens, heads))
    inputs = [normal(batch, tokens, heads, channels), log_decay, normal(batch, tokens, heads).sigmoid()]
    keys = [torch.nn.functional.normalize(normal(batch, tokens, groups, width), dim=-1) for _ in range(2)]
    return [*inputs, *keys, normal(batch, heads, channels, width) if started else None], oracle_delta


def kalma_case(tokens, batch, started, seed):
    normal, heads, channels, width = draw(seed), 2, 3, 4
    gates = -torch.nn.functional.softplus(normal(batch, tokens, heads)), normal(batch, tokens, heads).sigmoid()
    keys = [torch.nn.functional.normalize(normal(batch, tokens, heads, width), dim=-1) for _ in range(2)]
    read = normal(batch, heads, channels + width, 6)
    state = read @ read[:, :, channels:].mT  # as six tokens leave it
    return [normal(batch, tokens, heads, channels), *gates, *keys, state if started else None], oracle_kalma


def innovation_case(tokens, batch, started, seed):
    normal, taps, size = draw(seed), 3, 7
    y, history = normal(batch, tokens, size), normal(batch, taps, size) if started else torch.zeros(batch, taps, size)

    def oracle(y, history):
        line = torch.cat([history, y], dim=1)
        rows = [oracle_output_innovation(row, taps)[taps:] for row in line]
        return torch.stack([torch.as_tensor(row, dtype=y.dtype) for row in rows])

    return [y, history.double()], oracle


def expiry_case(tokens, batch, started, seed):
    """Keys with ties; the memory after each token by scores that are compared one at a time."""
    window, slots, block = 3, 2, 4
    keys = torch.randint(0, 5, (batch, tokens), generator=torch.Generator().manual_seed(seed)).double()
    inputs = [keys, torch.ones_like(keys, dtype=torch.bool), window, slots, block, tokens + window]

    def oracle(keys, valid, *sizes):
        rows = [oracle_eidetic(row, window, slots) for row in keys.tolist()]
        expiry = torch.tensor([expiry for _, expiry in rows], dtype=torch.float64).reshape(keys.shape)
        kept = [[sorted(sets[t]) for t in range(0, tokens + window, block)] for sets, _ in rows]
        return expiry, kept

    return inputs, oracle


def attention_sets(tokens, batch, past, seed, window=5, fading=2, block=4) -> list:
    """[eidetic | fading | local] and how each offers its keys, as the operation takes them."""
    _, members = three_sets(generator(seed), tokens, window, 3, fading, past, block, batch)
    (eidetic, index), (faded, _), (local, _) = members
    return [
        [eidetic, index.expand(batch, -1, -1)],
        [faded, (1 - window - fading, -window)],
        [local, (1 - window, 0)],
    ]


def attention_case(tokens, batch, started, seed):
    sets = attention_sets(tokens, batch, 6 if started else 0, seed)
    query = torch.randn(batch, tokens, 4, 6, generator=generator(seed + 1), dtype=torch.float64)

    def oracle(query, sets, block, scaling):
        indices = [offered[0] if isinstance(offered, torch.Tensor) else None for _, offered in sets]
        return one_by_one(query, [(keyset, index) for (keyset, _), index in zip(sets, indices)], block)

    return [query, sets, 4, SCALING], oracle


CASES = {
    "conv": conv_case,
    "conv_step": conv_case,
    "chunk_scan": scan_case,
    "scan_step": scan_case,
    "s6_scan": s6_case,
    "s6_step": s6_case,
    "delta_scan": delta_case,
    "delta_step": delta_case,
    "kalma_scan": kalma_case,
    "kalma_step": kalma_case,
    "innovation": innovation_case,
    "expiry": expiry_case,
    "memory_attention": attention_case,
}


def cast(value, dtype):
    """Tensors of real numbers in `dtype`, wherever they are."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype, copy=True) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(part, dtype) for part in value))
    return [cast(part, dtype) for part in value] if isinstance(value, list) else value


def tensors(result) -> list[torch.Tensor]:
    return [value for value in (result if isinstance(result, tuple) else (result,)) if value is not None]


def compare_expiry(result, expected):
    expiry, kept = expected
    torch.testing.assert_close(result.expiry.double().masked_fill(result.expiry == NEVER, torch.inf), expiry)
    found = [[sorted(slot for slot in block if slot >= 0) for block in row] for row in result.slots.tolist()]
    assert found == kept


def flat(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list | tuple) else []


def fake_load(monkeypatch, **present):
    """`load` that finds or misses packages by name, whatever is installed here."""
    real = kernels_cuda.load

    def load(module, name):
        package = module.partition(".")[0]
        if package in present:
            return (object(), "") if present[package] else (None, f"{package} is not installed")
        return real(module, name)

    load.cache_clear = real.cache_clear
    return load


def chosen(op, **situation) -> list[str]:
    situation = {"device": "cuda", "dtype": torch.bfloat16} | situation
    return [form.backend for form in choose(op, Situation(**situation)).forms]


def python(code: str, *folders: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs `code` in a process of its own that finds packages in `folders` and the checkout."""
    root = Path(dispatch_bmojo.__file__).parents[1]
    paths = [*map(str, folders), str(root)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", **variables}
    environment.pop(ENVIRONMENT, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def tiny_model(dtype=torch.float32, **fields):
    model = BMojoForCausalLM(BMojoConfig(**SIZES | MIXED_LAYERS | fields))
    return randomize_(model).to(dtype).eval()


def read_and_decode(model, ids, mask):
    """Logits of one prefill, of a second one that continues, and of tokens one at a time, with left pads."""
    with torch.no_grad():
        outputs = [model(input_ids=ids[:, :13], attention_mask=mask[:, :13])]
        for start, stop in [(13, 20), *((t, t + 1) for t in range(20, ids.shape[1]))]:
            past = outputs[0].past_key_values
            outputs.append(model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past))
    return torch.cat([output.logits for output in outputs], dim=1)


def padded_batch(columns=26):
    ids = torch.randint(0, VOCAB, (2, columns))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask
