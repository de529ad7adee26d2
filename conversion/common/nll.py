"""Reading a text piece by piece: negative log-likelihood of every token and what the model would have said instead.

    nll_i = -log p(token_i+1 | token_0 ... token_i),   i = 0 ... T-2,   its context is i + 1 tokens long

The text goes through the model's own cache in pieces, so that memory is bounded by the piece and the cache, at any T;
any split gives the same logits. Positions are put in buckets by the length of the context, in windows W.

Shapes: ids [1, T]; nll, predicted [T-1]; V the vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from modeling_bmojo import CACHE_NAME, cache_of


class Reading(NamedTuple):
    """What a model made of a text.

    nll: `[T-1]` nats, float32. predicted: `[T-1]`, the likeliest next token at each place, teacher-forced.
    following: the likeliest token after the text. cache: the model's memory of the whole text.
    """

    nll: torch.Tensor
    predicted: torch.Tensor
    following: int
    cache: Any


@torch.inference_mode()
def read(model: torch.nn.Module, ids: torch.Tensor, chunk: int, bar: Any = None) -> Reading:
    """Read `ids` `[1, T]`, `chunk` tokens at a time.

    Args:
        model: any causal model of transformers, in evaluation mode. bar: a tqdm that counts tokens, or None.

    Raises:
        ValueError: the model's logits are not finite.
    """
    device = next(model.parameters()).device
    ids = ids.to(device)
    nll, predicted, following, first = [], [], -1, 0
    for out in in_pieces(model, ids, chunk, bar):
        logits = out.logits[0].float()
        best, after = logits.argmax(-1), first + len(logits)
        targets = ids[0, first + 1 : after + 1]
        nll.append(cross_entropy(logits[: len(targets)], targets, reduction="none").cpu())
        predicted.append(best[: len(targets)].cpu())
        following = int(best[-1])
        if not bool(torch.isfinite(nll[-1]).all()):
            raise ValueError(f"the model's NLL is not finite between tokens {first} and {after}.")
        first = after
    return Reading(torch.cat(nll), torch.cat(predicted), following, cache_of(out))


def in_pieces(
    model: torch.nn.Module, ids: torch.Tensor, chunk: int, bar: Any = None, cache: Any = None, **options: Any
) -> Iterator[Any]:
    """Let the model read `ids` `[1, T]`, on its device, `chunk` tokens at a time, into one cache; yield each output.

    Args:
        bar: a tqdm that counts tokens, or None. cache: to read into; None: the model's own, empty. options: of the
            model's forward, such as `logits_to_keep`.
    """
    for piece in ids.split(chunk, dim=1):
        out = model(input_ids=piece, **{CACHE_NAME: cache}, use_cache=True, **options)
        cache = cache_of(out)
        yield out
        if bar is not None:
            bar.update(piece.shape[1])


def buckets(window: int, tokens: int) -> dict[str, range]:
    """Return places of `nll` by the length c of their context, in windows: c <= W, W < c <= 4 W, ...; empty ones are
    left out.

    `beyond W` are all c > W, `second half` the last T // 2 places.
    """
    bounds = {
        "inside W": (0, window),
        "W to 4W": (window, 4 * window),
        "4W to 16W": (4 * window, 16 * window),
        "beyond 16W": (16 * window, tokens),
        "beyond W": (window, tokens),
        "second half": (tokens - 1 - tokens // 2, tokens),
    }
    places = {name: range(first, min(last, tokens - 1)) for name, (first, last) in bounds.items()}
    return {name: place for name, place in places.items() if len(place)}


def bucket_means(values: torch.Tensor, window: int) -> dict[str, float]:
    """Mean of `values` `[T-1]` in every bucket of `buckets`."""
    return {
        name: values[place.start : place.stop].double().mean().item()
        for name, place in buckets(window, len(values) + 1).items()
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over texts and its standard error; None for a single text, which says nothing about the others."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    spread = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(spread / len(values))


def mean_beyond(
    model: torch.nn.Module, texts: Iterable[torch.Tensor], window: int, chunk: int, bar: Any = None
) -> list[float]:
    """Mean NLL beyond the window, text by text: what layers are chosen by."""
    return [read(model, ids, chunk, bar).nll[window:].double().mean().item() for ids in texts]


def curve(values: torch.Tensor, points: int = 24) -> list[tuple[float, float]]:
    """`values` `[T-1]` averaged in bins that grow by a constant factor: (length of the context, mean) for a diagram."""
    edges = torch.logspace(0, math.log2(len(values) + 1), points + 1, base=2.0).round().long().unique().tolist()
    return [
        (math.sqrt(first * last), values[first - 1 : last - 1].double().mean().item())
        for first, last in pairwise(edges)
    ]
