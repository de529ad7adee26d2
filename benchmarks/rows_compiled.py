"""Row "compiled": the decoding step compiled by regions, against the plain step and the source's, compiled with its
static cache.

Optional, because compiling takes minutes on a CPU and needs a C++ compiler. Where compiling fails, the compiled step
gives other logits or compiles again at later tokens, a remark says so and nothing is timed.
"""

import copy
import time
from collections.abc import Iterator

import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

from modeling_bmojo import CACHE_NAME, BMojoCache

from .actions import SIDES, STEPS, model_checks, models, per_token
from .models import random_ids
from .row import Check, Context, Figure, Row, difference, figure
from .timing import Action, Rounds


TOKENS, QUICK_TOKENS = 512, 96
ROOM = 512  # places of the static cache beyond the tokens read


@torch.no_grad()
def read(side: str, model: torch.nn.Module, tokens: int):
    """Return the cache after T tokens, of the kind that suits a compiled step."""
    cache = BMojoCache(model.config) if side == "ours" else StaticCache(model.config, max_cache_len=tokens + ROOM)
    model(random_ids(model.config.vocab_size, tokens), **{CACHE_NAME: cache}, logits_to_keep=1)
    return cache


def stepper(forward, model: torch.nn.Module, cache, count: int) -> Action:
    """`count` tokens through `forward`, which is the model or its compiled form; returns the last logits."""
    ids = random_ids(model.config.vocab_size, 1)

    def decode() -> torch.Tensor:
        with torch.no_grad():
            for _ in range(count):
                logits = forward(ids, **{CACHE_NAME: cache}, use_cache=True).logits
            return logits

    return decode


def compiled_step(side: str, model: torch.nn.Module, tokens: int) -> tuple[Action, str]:
    """Return the compiled step and what compiling did.

    Raises:
        ValueError: the compiled step gives other logits, or is not done with compiling. Whatever the compiler raises
            comes through.
    """
    counters.clear()
    cache = read(side, model, tokens)
    wanted = stepper(model, model, read(side, model, tokens), 3)()
    if side == "ours":
        forward = model = copy.deepcopy(model)
        model.compile_regions()
    else:
        forward = torch.compile(model, dynamic=False)
    start = time.perf_counter()
    largest = difference(stepper(forward, model, cache, 3)(), wanted)
    spent = time.perf_counter() - start
    if not largest <= 1e-3:
        raise ValueError(f"its logits differ from the plain step's by {largest:.1e}")
    graphs = counters["stats"]["unique_graphs"]
    decode = stepper(forward, model, cache, STEPS)
    decode()
    later, breaks = counters["stats"]["unique_graphs"] - graphs, sum(counters["graph_break"].values())
    if later:
        raise ValueError(f"the step is compiled again: {later} graphs in {STEPS} more tokens, {breaks} graph breaks")
    return decode, f"{graphs} graphs in {spent:.0f} s, {breaks} graph breaks, none compiled at later tokens"


def attempted(label: str, side: str, model: torch.nn.Module, tokens: int) -> tuple[Action | None, str]:
    """Return `compiled_step`'s, or None where it failed, and a remark on what happened."""
    try:
        action, found = compiled_step(side, model, tokens)
    except Exception as error:  # the compiler's own exceptions, of many types
        words = (str(error).strip().splitlines() or [""])[0]
        return None, f"{label}: the compiled step was not timed: {type(error).__name__}: {words}"
    return action, f"{label}: {found}"


def figures(context: Context) -> Iterator[Figure | str]:
    tokens = QUICK_TOKENS if context.quick else TOKENS
    pair, actions = models(context), {}
    torch._dynamo.reset()
    for side in SIDES:
        action, remark = attempted(side, side, pair[side], tokens)
        yield remark
        if action is not None:
            actions[side] = action
    if "ours" not in actions:
        return
    actions["plain"] = stepper(pair["theirs"], pair["theirs"], read("theirs", pair["theirs"], tokens), STEPS)
    actions["ours, plain"] = stepper(pair["ours"], pair["ours"], read("ours", pair["ours"], tokens), STEPS)
    seconds = per_token(context.alternate(actions, Rounds(least=5, most=15, budget=30)))
    labels = {"theirs": "source, compiled", "plain": "source, not compiled", "ours, plain": "ours, not compiled"}
    for which, label in labels.items():
        if which in seconds:
            goal = context.goal("decode compiled") if which == "ours, plain" else None
            yield figure("one decoding step, compiled", label, tokens, seconds["ours"], seconds[which], goal=goal)


def checks(context: Context) -> list[Check]:
    return model_checks(context)


TITLE = "the decoding step compiled (ours by regions); the models of prefill and decode"
ROWS = [Row("compiled", TITLE, checks, figures, optional=True)]
