"""Row "int8": one more token of the graft with torchao's 8-bit weights (docs/quantised.md) against itself in fp32.

Behind T tokens that both have read, W=512. Activations, cache and head stay fp32. It runs where torchao is installed.
A plain step multiplies with numbers that it has converted to fp32 first; one compiled by regions converts them as it
reads them. Where compiling fails, a remark says so and the plain steps alone are timed.
"""

import functools
from collections.abc import Iterator

import torch
from transformers import TorchAoConfig

from modeling_bmojo import BMojoCache, BMojoForCausalLM

from .actions import models, per_token, read_on, steps, steps_check
from .limits import step_limits, weight_bytes
from .models import random_ids
from .row import Check, Context, Figure, Row, difference, figure
from .rows_compiled import attempted
from .timing import Rounds


TOKENS, QUICK_TOKENS = 512, 96
NEAR = 0.1  # of the logits, as a share of the largest


@functools.lru_cache(maxsize=1)
def converted(path: str) -> BMojoForCausalLM:
    """Return the graft of a folder with its linear maps in 8 bits."""
    from torchao.quantization import Int8WeightOnlyConfig

    how = TorchAoConfig(Int8WeightOnlyConfig())
    return BMojoForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=how, device_map="cpu", attn_implementation="sdpa"
    ).eval()


def both(context: Context) -> dict[str, BMojoForCausalLM]:
    return {"ours": converted(context.models.path("ours")), "theirs": models(context, sides=("ours",))["ours"]}


@torch.inference_mode()
def checks(context: Context) -> list[Check]:
    """Return that a step is the end of a prefill, and that the logits are near those of fp32."""
    pair = both(context)
    ids = random_ids(pair["ours"].config.vocab_size, pair["ours"].config.window_size)
    apart = difference(*(model(ids).logits for model in pair.values()))
    what = f"logits of {ids.shape[1]} tokens, int8 against fp32"
    return [steps_check(pair["ours"], "float32"), Check(what, apart, NEAR)]


def figures(context: Context) -> Iterator[Figure | str]:
    pair, tokens = both(context), QUICK_TOKENS if context.quick else TOKENS
    caches = {side: BMojoCache(model.config) for side, model in pair.items()}
    for side, model in pair.items():
        read_on(model, caches[side], tokens)
    bounds = {side: step_limits(model, caches[side], steps(model, caches[side], 1)) for side, model in pair.items()}
    actions = {side: steps(model, caches[side]) for side, model in pair.items()}
    for side, label in (("ours", "int8"), ("theirs", "fp32")):
        action, remark = attempted(f"{label}, compiled by regions", "ours", pair[side], tokens)
        yield remark
        if action is not None:
            actions[f"{side}, compiled"] = action
    seconds = per_token(context.alternate(actions, Rounds(least=5, most=15, budget=40)))
    plain, told = seconds["theirs"], dict(dtype="int8", limits=bounds)
    yield figure("one decoding step, int8 weights", "itself, fp32", tokens, seconds["ours"], plain, **told)
    if "ours, compiled" in seconds:
        name, steps_of = "one decoding step, int8 weights, compiled", seconds["ours, compiled"]
        yield figure(name, "itself, fp32", tokens, steps_of, plain, goal=context.goal("decode int8"), **told)
        if "theirs, compiled" in seconds:
            yield figure(name, "itself, fp32, compiled", tokens, steps_of, seconds["theirs, compiled"], dtype="int8")
    sizes = [[weight_bytes(pair[side])] for side in ("ours", "theirs")]
    yield figure("weights that a step reads", "itself, fp32", tokens, *sizes, "B", dtype="int8")


TITLE = "one more token with 8-bit weights; the graft of decode"
ROWS = [Row("int8", TITLE, checks, figures, needs="torchao")]
