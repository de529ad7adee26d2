"""Row "decode": one more token behind T tokens, the real SmolLM2-135M against its graft, W=512 and W=256.

Ours has read the T tokens; the source's cache is filled with random keys and values of the same shape (a step's work
does not depend on them), because reading 32,768 tokens takes it minutes. Beside each ratio stand the operations that a
step starts and the time that reading weights and memory takes at the least.
"""

import copy
from collections.abc import Iterator

from modeling_bmojo import BMojoCache

from .actions import ALL_SIDES, MAIN, MODELS, all_checks, described, filled_cache, models, per_token, read_on, steps
from .limits import step_limits
from .models import FORMATS
from .row import Context, Figure, Row, figure
from .timing import Rounds


TOKENS, QUICK_TOKENS = (512, 8192), (64, 256)
FAR = 32768  # in fp32 only: reading so far takes minutes
ROUNDS = Rounds(least=5, most=15, budget=20)


def figures(context: Context) -> Iterator[Figure | str]:
    yield described(context)
    for dtype in context.dtypes:
        loaded = models(context, dtype, ALL_SIDES)
        memories = {side: BMojoCache(loaded[side].config) for side in ALL_SIDES[:-1]}
        far = (FAR,) if dtype == MAIN and not context.quick else ()
        for tokens in (*(QUICK_TOKENS if context.quick else TOKENS), *far):
            for side, memory in memories.items():
                read_on(loaded[side], memory, tokens)
            caches = {side: copy.deepcopy(memory) for side, memory in memories.items()}
            caches["theirs"] = filled_cache(loaded["theirs"].config, tokens, dtype=FORMATS[dtype])
            yield from at(context, tokens, dtype, loaded, caches)


def at(context: Context, tokens: int, dtype: str, loaded: dict, caches: dict) -> Iterator[Figure]:
    """Time a step of every side behind its cache."""
    bounds = {side: step_limits(loaded[side], caches[side], steps(loaded[side], caches[side], 1)) for side in caches}
    actions = {side: steps(loaded[side], caches[side]) for side in ALL_SIDES}
    seconds = per_token(context.alternate(actions, ROUNDS))
    for side in ALL_SIDES[:-1]:
        main = side == "ours"
        yield figure(
            f"one decoding step, W={loaded[side].config.window_size}", "source", tokens, seconds[side],
            seconds["theirs"], goal=context.goal(f"decode {tokens}", dtype) if main else None,
            panel=f"one decoding step, {dtype}" if main else None, dtype=dtype,
            limits={"ours": bounds[side], "theirs": bounds["theirs"]},
        )  # fmt: skip


ROWS = [Row("decode", f"one more token; {MODELS}", all_checks, figures)]
