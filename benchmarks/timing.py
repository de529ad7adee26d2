"""Time by alternation: every figure of the benchmark compares things that were run in turn, in one process.

    round 0:  a b c      round 1:  c b a      round 2:  a b c ...        ratio of a round = ours / theirs, in that round

The order turns round, so a machine that warms up or slows down favours nobody. A figure is the median of the rounds'
ratios, and their smallest and largest say how far to trust it; the medians of both times stand beside it.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


Action = Callable[[], object]
SHORTEST = 0.02  # seconds: a shorter action is repeated until one timing takes this long


class Rounds(NamedTuple):
    """How many rounds: at least `least`, then more until `budget` seconds are spent or there are `most`.

    warm: run everything once before, untimed. Only what takes minutes goes without.
    """

    least: int = 5
    most: int = 15
    budget: float = 10.0
    warm: bool = True


class Ratio(NamedTuple):
    """Medians in the unit of the samples, the median, smallest and largest ratio of a round, and the rounds."""

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    rounds: int


def alternate(
    actions: dict[str, Action],
    rounds: Rounds,
    wait: Action | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run the actions in turn and return the seconds of one call of each, round by round.

    Args:
        actions: by name, in the order of the first round. rounds: how many rounds.
        wait: waits until the device is done (CUDA); called before and after every timing.
    """
    start = clock()
    calls = dict.fromkeys(actions, 1)
    if rounds.warm:
        for name, action in actions.items():
            calls[name] = calls_needed(action, wait, clock)
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for done in range(rounds.most):
        begin = clock()
        gc.collect()  # now, so that it does not come in the middle
        for name in list(actions) if done % 2 == 0 else reversed(list(actions)):
            seconds[name].append(timed(actions[name], calls[name], wait, clock))
        now = clock()
        if done + 1 >= rounds.least and now - start + (now - begin) > rounds.budget:
            break
    return seconds


def calls_needed(action: Action, wait: Action | None, clock: Callable[[], float]) -> int:
    """Run the action, which compiles, allocates and fills caches; return how many calls make a timing long enough."""
    first = timed(action, 1, wait, clock)
    if first > 10 * SHORTEST:
        return 1
    return max(1, math.ceil(SHORTEST / max(timed(action, 1, wait, clock), 1e-9)))


def timed(action: Action, calls: int, wait: Action | None, clock: Callable[[], float]) -> float:
    """Return seconds per call."""
    if wait is not None:
        wait()
    start = clock()
    for _ in range(calls):
        action()
    if wait is not None:
        wait()
    return (clock() - start) / calls


def compare(ours: list[float], theirs: list[float]) -> Ratio:
    """Return the statistics of two lists of samples of the same rounds.

    Raises:
        ValueError: no rounds, or not equally many.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"ours has {len(ours)} rounds, theirs {len(theirs)}: must be as many, at least one.")
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return Ratio(
        statistics.median(ours),
        statistics.median(theirs),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        len(ratios),
    )
