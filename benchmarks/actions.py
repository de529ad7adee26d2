"""What the rows of whole models time, and on which models: the source, its graft, and the graft with half the window.

Sides are called `"ours"`, `"half"` (the same graft, W / 2) and `"theirs"`.

Shapes: B batch, T tokens, G key/value heads, D head dim, W window.
"""

import functools

import torch
from transformers import DynamicCache

from modeling_bmojo import CACHE_NAME, BMojoCache, BMojoForCausalLM, cache_of

from .models import load, random_ids
from .row import Check, Context, difference
from .timing import Action


SIDES = ("ours", "theirs")
ALL_SIDES = ("ours", "half", "theirs")
STEPS = 4  # tokens per timing
MAIN = "float32"  # the format of rows that have one
# The largest difference of logits, as a share of the largest. In bf16 up to 0.031 was measured between the graft and
# its source, and as much between either and the source in fp32.
NEAR = {"float32": 1e-3, "bfloat16": 6e-2}
MODELS = "SmolLM2-135M-Instruct (a random 2-layer Llama in a quick run) and its graft"


@functools.cache
def window_of(path: str) -> int:
    """Return W of a graft's folder."""
    return BMojoForCausalLM.config_class.from_pretrained(path).window_size


def recipe(context: Context, side: str, dtype: str = MAIN) -> dict:
    """Return the arguments of `models.load` for a side."""
    kind = "theirs" if side == "theirs" else "ours"
    path = context.models.path(kind)
    return dict(side=kind, path=path, dtype=dtype, window=window_of(path) // 2 if side == "half" else None)


def models(context: Context, dtype: str = MAIN, sides: tuple[str, ...] = SIDES) -> dict[str, torch.nn.Module]:
    """Return the models of these sides in a format."""
    return {side: load(**recipe(context, side, dtype)) for side in sides}


def described(context: Context) -> str:
    """Return which graft it is: what decides how much a step does."""
    config = models(context, sides=("ours",))["ours"].config
    fading = f"F={config.fading_size} at a stride of {config.fading_stride}"
    channels = f"{config.ssm_state_size} state channels"
    return f"the graft: innovation {config.innovation}, M={config.eidetic_size}, {fading}, {channels}"


@torch.inference_mode()
def model_checks(context: Context, dtypes: tuple[str, ...] = (MAIN,)) -> list[Check]:
    """Return that in each format the graft is its source within the window, and a step the end of a prefill beyond."""
    found = []
    for dtype in dtypes:
        pair = models(context, dtype)
        window = pair["ours"].config.window_size
        ids = random_ids(pair["ours"].config.vocab_size, window)
        within = difference(*(pair[side](ids).logits.float() for side in SIDES))
        found.append(Check(f"{dtype}, logits of {window} tokens (= W), graft against source", within, NEAR[dtype]))
        found.append(steps_check(pair["ours"], dtype))
    return found


def all_checks(context: Context) -> list[Check]:
    """Return `model_checks` in every format that is measured, with half the window too."""
    found = model_checks(context, context.dtypes)
    return found + [steps_check(load(**recipe(context, "half", dtype)), dtype) for dtype in context.dtypes]


@torch.inference_mode()
def steps_check(model: BMojoForCausalLM, dtype: str) -> Check:
    """Return that the last tokens of a text of two windows have the same logits one by one as at once."""
    window, last = model.config.window_size, 8
    tokens = 2 * window + 30
    ids = random_ids(model.config.vocab_size, tokens)
    whole = model(ids, use_cache=False, logits_to_keep=last).logits
    cache = cache_of(model(ids[:, :-last], use_cache=True, logits_to_keep=1))
    single = [model(ids[:, i : i + 1], **{CACHE_NAME: cache}).logits for i in range(tokens - last, tokens)]
    what = f"{dtype}, graft, W={window}, last {last} of {tokens:,} tokens: one by one against at once"
    return Check(what, difference(torch.cat(single, dim=1).float(), whole.float()), NEAR[dtype])


def prefill(model: torch.nn.Module, tokens: int) -> Action:
    """Read T tokens with a cache, and the logits of the last one."""
    ids = random_ids(model.config.vocab_size, tokens)

    def read() -> object:
        with torch.inference_mode():
            return model(ids, use_cache=True, logits_to_keep=1)

    return read


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


def source_bytes(config, tokens: int) -> int:
    """2 (keys, values) x layers x heads x head size x 4 bytes, per token."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * dim * 4 * tokens
