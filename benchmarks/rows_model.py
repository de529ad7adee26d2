"""Rows "prefill", "decode" and "cache": the real SmolLM2-135M against its all-layers graft, W=512, M=64, F=1, fp32.

prefill   T tokens with a cache, logits of the last one; peak memory of the whole process, in processes of their own.
          Long prefills take minutes, so both their time and their memory come from these processes, run in turn.
decode    one token behind T tokens. Ours has read them; the source's cache is filled with random keys and values of the
          same shape (a step's work does not depend on them), because reading 32,768 tokens takes it minutes.
cache     bytes of what is remembered. Ours: what one layer holds after reading T tokens, times the layers.

Shapes: T tokens; the source has n layers, G key/value heads of D.
"""

import copy
from collections.abc import Iterator

import torch
from transformers import DynamicCache

from modeling_bmojo import CACHE_NAME, BMojoCache, BMojoForCausalLM, cache_of

from .memory import Measured, in_child
from .models import load, random_ids
from .row import Check, Context, Figure, Row, difference, figure
from .timing import Action, Rounds


PREFILL, QUICK_PREFILL = (512, 2048), (64, 128)
LONG, QUICK_LONG = (8192, 32768), (256,)
DECODE, QUICK_DECODE = (512, 8192, 32768), (64, 256)
CACHE, QUICK_CACHE = (512, 2048, 8192, 32768, 131072), (128, 256, 512)
STEPS = 4  # tokens per timing
LONG_BUDGET, LONG_MOST = 240.0, 3  # seconds per length, rounds; one round is always made
CASE = "benchmarks.rows_model:case"
SIDES = ("ours", "theirs")


def prefill(model: torch.nn.Module, tokens: int) -> Action:
    ids = random_ids(model.config.vocab_size, tokens)

    def read() -> object:
        with torch.inference_mode():
            return model(ids, use_cache=True, logits_to_keep=1)

    return read


def case(side: str, path: str, tokens: int) -> Action:
    """Return what a child process measures: the prefill of one model."""
    return prefill(load(side, path), tokens)


def both(context: Context) -> dict[str, torch.nn.Module]:
    return {side: load(side, context.models.path(side)) for side in SIDES}


@torch.inference_mode()
def model_checks(context: Context) -> list[Check]:
    """Return the graft is the source within the window; beyond it, its prefill is its step-by-step reading."""
    models = both(context)
    ours, theirs = models["ours"], models["theirs"]
    window = ours.config.window_size
    ids = random_ids(ours.config.vocab_size, window)
    within = difference(ours(ids).logits, theirs(ids).logits)
    found = [Check(f"logits of {window} tokens (= W), graft against source", within, 1e-3)]
    tokens, steps = 2 * window + 30, 8
    ids = random_ids(ours.config.vocab_size, tokens)
    whole = ours(ids, use_cache=False, logits_to_keep=steps).logits
    cache = cache_of(ours(ids[:, :-steps], use_cache=True, logits_to_keep=1))
    single = [ours(ids[:, i : i + 1], **{CACHE_NAME: cache}).logits for i in range(tokens - steps, tokens)]
    beyond = difference(torch.cat(single, dim=1), whole)
    return [*found, Check(f"graft, last {steps} of {tokens:,} tokens: one by one against at once", beyond, 1e-3)]


def prefill_figures(context: Context) -> Iterator[Figure | str]:
    models = both(context)
    for tokens in QUICK_PREFILL if context.quick else PREFILL:
        rounds = Rounds(least=3, most=9, budget=40)
        seconds = context.alternate({side: prefill(model, tokens) for side, model in models.items()}, rounds)
        yield prefill_figure(context, tokens, seconds["ours"], seconds["theirs"])
        yield memory_figure(tokens, in_children(context, tokens))
    for tokens in QUICK_LONG if context.quick else LONG:
        rounds = long_rounds(context, tokens)
        seconds = {side: [found[side].seconds for found in rounds] for side in SIDES}
        yield prefill_figure(context, tokens, seconds["ours"], seconds["theirs"], "each run in a process of its own")
        yield memory_figure(tokens, rounds[0])


def long_rounds(context: Context, tokens: int) -> list[dict[str, Measured]]:
    """Round of `in_children`, the order turning round, as many as fit the budget."""
    rounds, spent = [in_children(context, tokens)], 0.0
    while len(rounds) < LONG_MOST and not context.quick:
        spent += sum(measured.seconds for measured in rounds[-1].values())
        if spent * (1 + 1 / len(rounds)) > LONG_BUDGET:
            break
        rounds.append(in_children(context, tokens, turned=len(rounds) % 2 == 1))
    return rounds


def in_children(context: Context, tokens: int, turned: bool = False) -> dict[str, Measured]:
    """Prefill of both models, each in a fresh process, one after the other."""

    def one(side: str) -> Measured:
        arguments = {"side": side, "path": context.models.path(side), "tokens": tokens}
        return in_child(CASE, arguments, {"tokens": 32}, context.threads, as_users=True)

    return {side: one(side) for side in (reversed(SIDES) if turned else SIDES)}


def prefill_figure(context: Context, tokens: int, ours: list, theirs: list, note: str = "") -> Figure:
    goal = context.goal(f"prefill {tokens}")
    return figure("prefill", "source", tokens, ours, theirs, goal=goal, panel="prefill", note=note)


def memory_figure(tokens: int, found: dict[str, Measured]) -> Figure:
    ours, theirs = found["ours"], found["theirs"]
    note = f"beyond the loaded model {ours.extra / 1e6:,.0f} MB, source {theirs.extra / 1e6:,.0f} MB"
    name = "prefill, peak memory of the process"
    return figure(name, "source", tokens, [ours.peak], [theirs.peak], "B", panel="peak process memory", note=note)


@torch.inference_mode()
def filled_cache(config, tokens: int, rows: int = 1, **options) -> DynamicCache:
    """Return a cache of the source as if T tokens had been read: keys and values `[B, G, T, D]` of random numbers."""
    cache = DynamicCache(config=config)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        pair = torch.randn(2, rows, config.num_key_value_heads, tokens, dim, **options)
        cache.update(pair[0], pair[1], layer)
    return cache


def steps(model: torch.nn.Module, cache, count: int = STEPS, rows: int = 1) -> Action:
    """`count` tokens one by one; the cache moves on with every call (by a few dozen tokens in all)."""
    ids = random_ids(model.config.vocab_size, 1, rows).to(model.device)

    def decode() -> None:
        with torch.inference_mode():
            for _ in range(count):
                model(ids, **{CACHE_NAME: cache}, use_cache=True)

    return decode


def per_token(seconds: dict[str, list[float]], count: int = STEPS) -> dict[str, list[float]]:
    return {name: [value / count for value in values] for name, values in seconds.items()}


@torch.inference_mode()
def read_on(model: torch.nn.Module, cache: BMojoCache, tokens: int) -> None:
    """Read until `cache` has seen T tokens."""
    seen = cache.get_seq_length()
    model(random_ids(model.config.vocab_size, tokens)[:, seen:], **{CACHE_NAME: cache}, logits_to_keep=1)


def decode_figures(context: Context) -> Iterator[Figure | str]:
    models = both(context)
    memory = BMojoCache(models["ours"].config)
    for tokens in QUICK_DECODE if context.quick else DECODE:
        read_on(models["ours"], memory, tokens)
        caches = {"ours": copy.deepcopy(memory), "theirs": filled_cache(models["theirs"].config, tokens)}
        rounds = Rounds(least=5, most=15, budget=30)
        seconds = context.alternate({side: steps(models[side], caches[side]) for side in SIDES}, rounds)
        seconds = per_token(seconds)
        goal = context.goal(f"decode {tokens}")
        ours, theirs = seconds["ours"], seconds["theirs"]
        yield figure("one decoding step", "source", tokens, ours, theirs, goal=goal, panel="one decoding step")
        del caches


def source_bytes(config, tokens: int) -> int:
    """2 (keys, values) x layers x heads x head size x 4 bytes, per token."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * dim * 4 * tokens


def one_layer(model: BMojoForCausalLM) -> BMojoForCausalLM:
    """Return a model of the graft's first layer alone: reads long texts n times as fast."""
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 1, "layer_types": ["bmojo"]})
    single = BMojoForCausalLM(config).eval()
    single.model.embed_tokens, single.lm_head = model.model.embed_tokens, model.lm_head
    single.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    return single


@torch.inference_mode()
def our_bytes(single: BMojoForCausalLM, layers: int, tokens: int) -> int:
    """Return bytes of the cache of `layers` such layers after T tokens; the model's last output is held once."""
    cache = cache_of(single(random_ids(single.config.vocab_size, tokens), use_cache=True, logits_to_keep=1))
    return layers * (cache.nbytes - cache.last_hidden.nbytes) + cache.last_hidden.nbytes


@torch.inference_mode()
def cache_checks(context: Context) -> list[Check]:
    """Both ways to count give what the caches of the whole models hold after a text just longer than the window."""
    models = both(context)
    ours, theirs = models["ours"], models["theirs"]
    tokens = ours.config.window_size + 40
    ids = random_ids(ours.config.vocab_size, tokens)
    held = cache_of(ours(ids, use_cache=True, logits_to_keep=1)).nbytes
    counted = our_bytes(one_layer(ours), ours.config.num_hidden_layers, tokens)
    layers = cache_of(theirs(ids, use_cache=True, logits_to_keep=1)).layers
    source = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return [
        Check(f"bytes after {tokens} tokens, ours, layer by layer", abs(held - counted), 0),
        Check(f"bytes after {tokens} tokens, source, by formula", abs(source - source_bytes(theirs.config, tokens)), 0),
    ]


def cache_figures(context: Context) -> Iterator[Figure | str]:
    models = both(context)
    single, layers = one_layer(models["ours"]), models["ours"].config.num_hidden_layers
    sizes = {}
    for tokens in QUICK_CACHE if context.quick else CACHE:
        sizes[tokens] = our_bytes(single, layers, tokens)
        theirs = source_bytes(models["theirs"].config, tokens)
        goal = context.goal(f"cache {tokens}")
        yield figure("cache", "source", tokens, [sizes[tokens]], [theirs], "B", goal, panel="cache")
    before, last = list(sizes)[-2:]
    label = f"itself at {before:,} tokens"
    yield figure("cache", label, last, [sizes[last]], [sizes[before]], "B", context.goal("cache stays"))


MODELS = "SmolLM2-135M-Instruct (a random 2-layer Llama in a quick run) and its graft, fp32"
ROWS = [
    Row("prefill", f"reading a text; {MODELS}", model_checks, prefill_figures),
    Row("decode", f"one more token; {MODELS}", model_checks, decode_figures),
    Row("cache", f"bytes of the memory; {MODELS}", cache_checks, cache_figures),
]
