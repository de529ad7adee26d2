"""Row "cache": bytes of what is remembered, the real SmolLM2-135M against its graft, W=512, fp32.

Ours: what one layer holds after reading T tokens, times the layers. The source's: keys and values, by formula.
"""

from collections.abc import Iterator

import torch

from modeling_bmojo import BMojoForCausalLM, cache_of

from .actions import MODELS, models, source_bytes
from .models import random_ids
from .row import Check, Context, Figure, Row, figure


CACHE, QUICK_CACHE = (512, 2048, 8192, 32768, 131072), (128, 256, 512)


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
    pair = models(context)
    ours, theirs = pair["ours"], pair["theirs"]
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
    pair = models(context)
    single, layers = one_layer(pair["ours"]), pair["ours"].config.num_hidden_layers
    sizes = {}
    for tokens in QUICK_CACHE if context.quick else CACHE:
        sizes[tokens] = our_bytes(single, layers, tokens)
        theirs = source_bytes(pair["theirs"].config, tokens)
        goal = context.goal(f"cache {tokens}")
        yield figure("cache", "source", tokens, [sizes[tokens]], [theirs], "B", goal, panel="cache")
    before, last = list(sizes)[-2:]
    label = f"itself at {before:,} tokens"
    yield figure("cache", label, last, [sizes[last]], [sizes[before]], "B", context.goal("cache stays"))


ROWS = [Row("cache", f"bytes of the memory; {MODELS}, fp32", cache_checks, cache_figures)]
