"""Row "attention": the memory attention of one layer against what else could compute, or replace, it.

Against full causal attention (what the source does), against SDPA with a dense mask of exactly the same visibility
(keys: all inputs, then all fading tokens), and against compiled FlexAttention with that visibility as a block mask.
Masks are made before, and so are repeated key heads in the layout that SDPA and FlexAttention like: only the attention
is timed. Which tokens are kept is decided before, too; that is row "innovation".

Shapes: T tokens, 9 query heads and 3 key/value heads of 64, W=256, M=64, F=1. S = 2 T keys of the dense forms.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from . import adapters
from .memory import in_child
from .row import Check, Context, Figure, Row, difference, figure
from .timing import Action


HEADS, GROUPS, DIM, WINDOW, SLOTS, FADING = 9, 3, 64, 256, 64, 1
CAUSAL_TOKENS, QUICK_TOKENS = (1024, 4096, 16384), (512, 1024)
CASE = "benchmarks.rows_attention:case"


class Problem(NamedTuple):
    """query `[1, T, H, D]`; keys, values and those of the fading tokens `[1, T, G, D]`; what is kept."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    fading_keys: torch.Tensor
    fading_values: torch.Tensor
    selection: tuple


def problem(tokens: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, tokens, HEADS, DIM, generator=generator)
    others = [torch.randn(1, tokens, GROUPS, DIM, generator=generator) for _ in range(4)]
    selection = adapters.choose(torch.rand(1, tokens, generator=generator), WINDOW, SLOTS)
    return Problem(query, *others, selection)


def visible(expiry: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Whether queries see keys, by index into T and 2 T: input s iff s <= t < expiry_s; fading s iff s+W <= t < s+W+F.

    expiry: `[T]`. query, key: indices that broadcast against each other.
    """
    tokens = expiry.shape[0]
    fading = key >= tokens
    place = torch.where(fading, key - tokens, key)
    begin = torch.where(fading, place + WINDOW, place)
    end = torch.where(fading, place + WINDOW + FADING, expiry[place])
    return (begin <= query) & (query < end)


def heads_first(value: torch.Tensor) -> torch.Tensor:
    """`[1, T, G, D]` to contiguous `[1, H, T, D]`."""
    return value.repeat_interleave(HEADS // value.shape[2], dim=2).transpose(1, 2).contiguous()


def case(form: str, tokens: int) -> Action:
    """One attention as a call without arguments; also what a child process measures."""
    return {"ours": ours, "causal": causal, "dense": dense, "flex": flex}[form](problem(tokens))


def ours(given: Problem) -> Action:
    def attend() -> torch.Tensor:
        with torch.inference_mode():
            return adapters.memory_attention(*given, WINDOW, FADING)

    return attend


def causal(given: Problem) -> Action:
    query, keys, values = map(heads_first, given[:3])

    def attend() -> torch.Tensor:
        with torch.inference_mode():
            return scaled_dot_product_attention(query, keys, values, is_causal=True)

    return attend


def both_kinds(given: Problem) -> list[torch.Tensor]:
    """Query `[1, H, T, D]`; keys and values of inputs and fading tokens `[1, H, 2 T, D]`."""
    pairs = ((given.keys, given.fading_keys), (given.values, given.fading_values))
    return [heads_first(given.query), *(heads_first(torch.cat(pair, dim=1)) for pair in pairs)]


def dense(given: Problem) -> Action:
    query, keys, values = both_kinds(given)
    tokens = query.shape[2]
    mask = visible(given.selection.expiry[0], torch.arange(tokens)[:, None], torch.arange(2 * tokens)[None])

    def attend() -> torch.Tensor:
        with torch.inference_mode():
            return scaled_dot_product_attention(query, keys, values, mask)

    return attend


def flex(given: Problem) -> Action:
    """Compiled at the first call; raises what the compiler raises."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, keys, values = both_kinds(given)
    tokens, expiry = query.shape[2], given.selection.expiry[0]

    def seen(batch, head, query_index, key_index):
        return visible(expiry, query_index, key_index)

    mask = create_block_mask(seen, None, None, tokens, 2 * tokens, device=query.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend() -> torch.Tensor:
        with torch.no_grad():
            return compiled(query, keys, values, block_mask=mask)

    return attend


def checks(context: Context) -> list[Check]:
    """Against SDPA with the dense mask, which is written from the visibility rule alone."""
    found = []
    for tokens in (700, 512 if context.quick else 4096):
        given = problem(tokens)
        largest = difference(ours(given)().transpose(1, 2), dense(given)())
        found.append(Check(f"{tokens:,} tokens, fp32, against SDPA with the dense mask", largest, 1e-5))
    return found


def figures(context: Context) -> Iterator[Figure | str]:
    lengths = QUICK_TOKENS if context.quick else CAUSAL_TOKENS
    middle = QUICK_TOKENS[0] if context.quick else 4096
    label = "SDPA, full causal"
    for tokens in lengths:
        seconds = context.alternate({form: case(form, tokens) for form in ("ours", "causal")})
        goal = context.goal("attention, full causal") if tokens == 4096 else None
        panel = "memory attention, one layer"
        yield figure("memory attention", label, tokens, seconds["ours"], seconds["causal"], goal=goal, panel=panel)
    seconds = context.alternate({form: case(form, middle) for form in ("ours", "dense")})
    yield figure("memory attention", "SDPA, dense mask", middle, seconds["ours"], seconds["dense"])
    yield from against_flex(context, middle)
    bytes_ = {
        form: [in_child(CASE, {"form": form, "tokens": middle}, {"tokens": 300}, context.threads).extra]
        for form in ("ours", "causal", "dense")
    }
    for form, name in (("causal", label), ("dense", "SDPA, dense mask")):
        yield figure("memory attention, peak memory", name, middle, bytes_["ours"], bytes_[form], "B")


def against_flex(context: Context, tokens: int) -> Iterator[Figure | str]:
    """Compiling needs a C++ compiler and a torch that supports FlexAttention here; without, a remark says so."""
    given = problem(tokens)
    try:
        compiled = flex(given)
        result = compiled()
    except Exception as error:  # the compiler's own exceptions, of many types
        yield f"FlexAttention was not timed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return
    largest = difference(ours(given)().transpose(1, 2), result)
    if not largest <= 1e-5:
        yield f"FlexAttention was not timed: it differs from ours by {largest:.1e}"
        return
    seconds = context.alternate({"ours": ours(given), "flex": compiled})
    yield figure("memory attention", "FlexAttention, compiled", tokens, seconds["ours"], seconds["flex"])


TITLE = "memory attention of one layer, 9 heads of 64 on 3, W=256, M=64, F=1, fp32"
ROWS = [Row("attention", TITLE, checks, figures)]
