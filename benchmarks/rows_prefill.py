"""Rows "prefill" and "prefill-32k": the real SmolLM2-135M reading T tokens against its graft, W=512 and W=256.

With a cache, logits of the last token, both sides in the same format; peak memory of the whole process, in processes
of their own. Long prefills take minutes, so both their time and their memory come from these processes, run in turn.
"""

from collections.abc import Iterator

from .actions import ALL_SIDES, MODELS, all_checks, described, models, prefill, recipe
from .limits import prefill_limits
from .memory import Measured, in_child
from .models import load
from .row import Context, Figure, Row, figure
from .timing import Action, Rounds


SHORT, QUICK_SHORT = (512, 2048), (64, 128)
LONG, QUICK_LONG = 8192, 256
LONGEST, QUICK_LONGEST = 32768, 512
ROUNDS = Rounds(least=3, most=9, budget=20)
LONG_BUDGET, LONG_MOST = 150.0, 3  # seconds per format, rounds; one round is always made
CASE = "benchmarks.rows_prefill:case"


def case(tokens: int, **how) -> Action:
    """Return what a child process measures: the prefill of one model. how: of `models.load`."""
    return prefill(load(**how), tokens)


def figures(context: Context) -> Iterator[Figure | str]:
    yield described(context)
    for dtype in context.dtypes:
        for tokens in QUICK_SHORT if context.quick else SHORT:
            actions = {side: prefill(model, tokens) for side, model in models(context, dtype, ALL_SIDES).items()}
            seconds = context.alternate(actions, ROUNDS)
            yield from time_figures(context, tokens, dtype, seconds)
            yield memory_figure(tokens, dtype, in_children(context, tokens, dtype))
        yield from long_figures(context, QUICK_LONG if context.quick else LONG, dtype)


def longest_figures(context: Context) -> Iterator[Figure | str]:
    yield described(context)
    for dtype in context.dtypes:
        yield from long_figures(context, QUICK_LONGEST if context.quick else LONGEST, dtype)


def long_figures(context: Context, tokens: int, dtype: str) -> Iterator[Figure]:
    rounds = long_rounds(context, tokens, dtype)
    seconds = {side: [found[side].seconds for found in rounds] for side in ALL_SIDES}
    yield from time_figures(context, tokens, dtype, seconds, "each run in a process of its own")
    yield memory_figure(tokens, dtype, rounds[0])


def long_rounds(context: Context, tokens: int, dtype: str) -> list[dict[str, Measured]]:
    """Return rounds of `in_children`, the order turning round, as many as fit the budget."""
    rounds, spent = [in_children(context, tokens, dtype)], 0.0
    while len(rounds) < LONG_MOST and not context.quick:
        spent += sum(measured.seconds for measured in rounds[-1].values())
        if spent * (1 + 1 / len(rounds)) > LONG_BUDGET:
            break
        rounds.append(in_children(context, tokens, dtype, turned=len(rounds) % 2 == 1))
    return rounds


def in_children(context: Context, tokens: int, dtype: str, turned: bool = False) -> dict[str, Measured]:
    """Prefill of every model, each in a fresh process, one after the other."""

    def one(side: str) -> Measured:
        arguments = {"tokens": tokens, **recipe(context, side, dtype)}
        return in_child(CASE, arguments, {"tokens": 32}, context.threads, as_users=True)

    return {side: one(side) for side in (reversed(ALL_SIDES) if turned else ALL_SIDES)}


def time_figures(context: Context, tokens: int, dtype: str, seconds: dict, note: str = "") -> Iterator[Figure]:
    """Return ours and the half window against the source, with what bounds both; goals are for ours."""
    for side in ALL_SIDES[:-1]:
        pair = {"ours": side, "theirs": "theirs"}
        loaded = models(context, dtype, tuple(pair.values()))
        bounds = {name: prefill_limits(loaded[which], tokens, dtype) for name, which in pair.items()}
        main = side == "ours"
        yield figure(
            f"prefill, W={loaded[side].config.window_size}", "source", tokens, seconds[side], seconds["theirs"],
            goal=context.goal(f"prefill {tokens}", dtype) if main else None,
            panel=f"prefill, {dtype}" if main else None, note=note, dtype=dtype, limits=bounds,
        )  # fmt: skip


def memory_figure(tokens: int, dtype: str, found: dict[str, Measured]) -> Figure:
    ours, theirs = found["ours"], found["theirs"]
    note = f"beyond the loaded model {ours.extra / 1e6:,.0f} MB, source {theirs.extra / 1e6:,.0f} MB"
    name, panel = "prefill, peak memory of the process", f"peak process memory, {dtype}"
    return figure(name, "source", tokens, [ours.peak], [theirs.peak], "B", panel=panel, note=note, dtype=dtype)


ROWS = [
    Row("prefill", f"reading a text; {MODELS}", all_checks, figures),
    Row("prefill-32k", f"reading 32,768 tokens; {MODELS}", all_checks, longest_figures, optional=True),
]
