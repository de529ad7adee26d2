"""Row "storage": the graft with a storage against itself without, and against its source, in fp32.

K=C=1024, sketches of 16, means of blocks of 16 (32 of each size), W as the graft has it, no eidetic memory on
either side. The sketches are random, as the graft of this benchmark has none: which tokens they name differs from
fitted ones, what it costs to name and fetch them does not.

prefill   T tokens without a cache, against the source
decode    one token behind T tokens that were read, against the same model without storage
bytes     of the cache after T tokens, keys and values of stored tokens left out, against the source's cache

Shapes: T tokens.
"""

import copy
import functools
from collections.abc import Iterator

import torch

from modeling_bmojo import BMojoCache, BMojoForCausalLM

from .actions import per_token, read_on, source_bytes, steps
from .models import load, random_ids
from .row import Check, Context, Figure, Row, difference, figure
from .timing import Action, Rounds


STORED = dict(storage_size=1024, storage_candidates=1024, storage_sketch_size=16)
QUICK_STORED = dict(storage_size=8, storage_candidates=32, storage_sketch_size=4)
MEANS = dict(fading_mass=True, fading_size=32, fading_stride=16, eidetic_size=0)
# Whatever the graft's own config says of these.
EXACT = dict(storage_candidates=None, storage_sketch_size=None, fading_mass=False, fading_size=0, eidetic_size=0)
NONE = dict(EXACT, storage_size=0)
EVERYTHING = dict(EXACT, storage_size=1 << 20)
DECODE, QUICK_DECODE = (512, 2048, 8192), (96, 256)
PREFILL, QUICK_PREFILL = (2048, 8192), (256,)


@functools.lru_cache(maxsize=2)
def variant(path: str, fields: tuple) -> BMojoForCausalLM:
    """Return the graft of a folder with other memories."""
    return BMojoForCausalLM.from_pretrained(path, dtype=torch.float32, **dict(fields)).eval()


def with_storage(context: Context) -> BMojoForCausalLM:
    fields = (QUICK_STORED if context.quick else STORED) | MEANS
    return variant(context.models.path("ours"), tuple(fields.items()))


@torch.inference_mode()
def storage_checks(context: Context) -> list[Check]:
    """Return that a storage of everything is the source beyond the window, and a step the end of a prefill."""
    source = load("theirs", context.models.path("theirs"))
    whole = variant(context.models.path("ours"), tuple(EVERYTHING.items()))
    tokens = whole.config.window_size + 60
    ids = random_ids(source.config.vocab_size, tokens)
    beyond = difference(whole(ids, logits_to_keep=8).logits, source(ids, logits_to_keep=8).logits)
    model, cache = with_storage(context), BMojoCache(with_storage(context).config)
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    step = model(ids[:, -1:], past_key_values=cache).logits
    return [
        Check(f"logits behind {tokens} tokens (> W), all of them fetched: graft against source", beyond, 1e-3),
        Check(
            "the last of them one by one against at once", difference(step, model(ids, logits_to_keep=1).logits), 1e-3
        ),
    ]


def reading(model: torch.nn.Module, tokens: int) -> Action:
    ids = random_ids(model.config.vocab_size, tokens)

    def read() -> object:
        with torch.inference_mode():
            return model(ids, use_cache=False, logits_to_keep=1)

    return read


def storage_figures(context: Context) -> Iterator[Figure | str]:
    stored = with_storage(context)
    plain = variant(context.models.path("ours"), tuple(NONE.items()))
    source = load("theirs", context.models.path("theirs"))
    caches = {"ours": BMojoCache(stored.config), "theirs": BMojoCache(plain.config)}
    for tokens in QUICK_DECODE if context.quick else DECODE:
        read_on(stored, caches["ours"], tokens)
        read_on(plain, caches["theirs"], tokens)
        held = caches["ours"].nbytes - caches["ours"].storage_nbytes
        note = f"and {caches['ours'].storage_nbytes / 1e6:,.0f} MB of keys and values, wherever they lie"
        yield figure("storage, bytes", "source", tokens, [held], [source_bytes(source.config, tokens)], "B", note=note)
        actions = {side: steps(model, copy.deepcopy(caches[side])) for side, model in sides(stored, plain)}
        seconds = per_token(context.alternate(actions, Rounds(least=5, most=15, budget=20)))
        goal = context.goal(f"storage decode {tokens}")
        yield figure("storage, one step", "without storage", tokens, seconds["ours"], seconds["theirs"], goal=goal)
    for tokens in QUICK_PREFILL if context.quick else PREFILL:
        actions = {side: reading(model, tokens) for side, model in sides(stored, source)}
        seconds = context.alternate(actions, Rounds(least=1, most=5, budget=60, warm=tokens < 4096))
        goal = context.goal(f"storage prefill {tokens}")
        yield figure("storage, prefill", "source", tokens, seconds["ours"], seconds["theirs"], goal=goal)


def sides(ours: torch.nn.Module, theirs: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [("ours", ours), ("theirs", theirs)]


MODELS = "SmolLM2-135M-Instruct (a random 2-layer Llama in a quick run) and its graft, fp32"
ROWS = [Row("storage", f"every token stored, 1,024 fetched; {MODELS}", storage_checks, storage_figures)]
