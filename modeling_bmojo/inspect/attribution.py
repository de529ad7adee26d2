"""attribute: which passages of the past an answer drew on, by the votes of the layers' attention.

    e_h(p) = max(a_h(p) - n_h(p), 0)       a_h: weights of a query of the answer, for tokens beyond its window
    vote of head h = (argmax_p e_h(p), max_p e_h(p))

n_h(p) is the mean weight that p gets from neutral queries: tokens of the text itself in random order, asked in place of
what was asked. What gets weight whatever is asked, attention sinks above all, so wins nothing. The first `SINKS` tokens
take no part at all: answers give them more than neutral queries do. Votes close to each other are one passage; its
score is its share of all votes, and its layers are those that it got more votes from than any other passage did.

Attention says what was looked at, not what an answer was caused by. The weight of a fading token counts for the token
that it stands at. Only attention weights by token position are read: it makes no difference which memory a token is in.

Shapes: A tokens of the answer, L layers with attention, H query heads, Q queries, S positions.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn

from ..cache_bmojo import BMojoCache
from ..compat_bmojo import cache_of
from .trace import evaluating


SINKS = 4  # leading tokens of a row: they get weight because they are first, and more of it from some queries
NEUTRAL = 32  # neutral queries
AROUND = 8  # tokens on either side of the most voted one that are its passage
JOIN = 4  # passages with at most so many tokens between them are one
LEAST = 0.01  # of all votes; fewer make no passage
READ_AT_ONCE = 1024  # tokens read without weights
WEIGHT_BYTES = 1 << 26  # of the weights that exist at a time (those of a single query at least)


class Passage(NamedTuple):
    """A stretch of the past.

    first, last: positions of the first and last token that was voted for. score: its share of the votes, in (0, 1].
    layers: those that gave it more votes than any other passage. votes: of every token from first to last, in shares.
    """

    first: int
    last: int
    score: float
    layers: tuple[int, ...]
    votes: tuple[float, ...]


class Attribution(NamedTuple):
    """What an answer drew on beyond the window.

    row: of the batch. ids: real tokens of the row up to the answer's end, by position. answer: positions of the answer.
    window: W. layers: indices of the L layers with attention. positions, weights: `[A, L, H]`, the votes; weight 0 = no
    vote. beyond: `[A, L]`, the share of the attention that went beyond the window, sinks included; not that
    on fading tokens from inside it (`fading_delay`), although these sum up the past.
    """

    row: int
    ids: list[int]
    answer: range
    window: int
    layers: list[int]
    positions: torch.Tensor
    weights: torch.Tensor
    beyond: torch.Tensor

    def passages(self, count: int = 3, *, token: int | None = None) -> list[Passage]:
        """Return the passages that most votes are for, most first.

        Args:
            count: as many at most. token: what one token of the answer drew on, by its index there; None: all of it.

        Raises:
            ValueError: if count is no positive integer, or the answer has no such token.
        """
        if type(count) is not int or count < 1:
            raise ValueError(f"count={count!r}: must be an integer of at least 1; say how many passages to return.")
        tokens = len(self.answer)
        if token is not None and not -tokens <= token < tokens:
            raise ValueError(f"token={token}: the answer has {tokens} tokens; they count from 0.")
        chosen = slice(None) if token is None else [token]
        by_layer = self.weights.new_zeros(len(self.layers), self.answer.start, dtype=torch.float64)
        for index in range(len(self.layers)):
            places, votes = self.positions[chosen, index].flatten(), self.weights[chosen, index].flatten()
            by_layer[index].index_add_(0, places, votes.double())
        total = float(by_layer.sum())
        if total == 0:
            return []
        found = [self._passage(by_layer / total, span) for span in _joined(_spans(by_layer.sum(0) / total))]
        owner = torch.stack([by_layer[:, p.first : p.last + 1].sum(1) for p in found]).argmax(0)
        voting = by_layer.sum(1) > 0
        named = [
            p._replace(layers=tuple(n for n, o, v in zip(self.layers, owner.tolist(), voting.tolist()) if v and o == i))
            for i, p in enumerate(found)
        ]
        return sorted(named, key=lambda passage: -passage.score)[:count]

    def _passage(self, shares: torch.Tensor, span: tuple[int, int]) -> Passage:
        votes = shares[:, span[0] : span[1] + 1].sum(0)
        return Passage(*span, float(votes.sum()), (), tuple(votes.tolist()))


def attribute(
    model: nn.Module,
    input_ids: torch.Tensor,
    start: int,
    *,
    cache: BMojoCache | None = None,
    attention_mask: torch.Tensor | None = None,
    row: int = 0,
) -> Attribution:
    """Return which passages beyond the window an answer drew on. Neither model nor cache change.

    The tokens behind those that the cache has read are read again, on a copy; of the answer's the attention weights are
    looked at, a few queries at a time. That costs about as much as the answer did, and `NEUTRAL` tokens more.

    Args:
        model: a B'MOJO model. input_ids: `[B, T]`, the whole text and the answer at its end, as `generate()` returns it
            in `sequences`. start: the column of the answer's first token.
        cache: what the model remembers of the first columns of `input_ids`, short of the last token before the answer
            (its query finds the answer's first token); None: everything is read.
        attention_mask: `[B, T]`, 0 = pad. May end with the prompt: what comes behind it counts as real.
        row: of the batch.

    Raises:
        ValueError: if model is no B'MOJO with attention, `input_ids` and `attention_mask` do not fit each other or the
            cache, there is no such row, there is nothing before the answer or in it, or the cache has read too much.
    """
    _check_arguments(model, input_ids, start, cache, attention_mask, row)
    row %= input_ids.shape[0]
    known = 0 if cache is None else cache.get_seq_length()
    real = torch.ones(input_ids.shape[1], dtype=torch.bool)
    if attention_mask is not None:
        real[: attention_mask.shape[1]] = attention_mask[row].bool().cpu()
    ids = input_ids[row][real.to(input_ids.device)]
    before, seen = int(real[:start].sum()), int(real[:known].sum())
    if before == len(ids) or before == seen:
        what = "the answer has no real token" if before == len(ids) else "nothing real stands before it"
        raise ValueError(f"start={start}: {what} (or the cache has read it); say where the answer begins.")
    with evaluating(model):
        # A storage is as long as the text: besides the caller's cache one copy at a time.
        reader = _Reader(model, _row_of(cache, row))
        if cache is None:
            reader.read(ids[: before - 1])
            neutral = _Reader(model, copy.deepcopy(reader.cache)).neutral(ids[:before])
        else:
            neutral = reader.neutral(ids[:before])
            reader.cache = None
            reader = _Reader(model, _row_of(cache, row))
            reader.read(ids[seen : before - 1])
        votes = reader.votes(ids[before - 1 : -1], neutral)
    return Attribution(
        row, ids.tolist(), range(before, len(ids)), model.config.window_size, _attending(model.config), *votes
    )


def _row_of(cache: BMojoCache | None, row: int) -> BMojoCache | None:
    """Return a copy of a cache, of one row alone."""
    own = copy.deepcopy(cache)
    if own is not None and len(own.seen) > 1:
        own.batch_select_indices(torch.tensor([row], device=own.seen.device))
    return own


def _attending(config) -> list[int]:
    """Return the layers that have attention weights."""
    return [index for index, kind in enumerate(config.layer_types) if kind != "linear_attention"]


class _Reader:
    """Reads on, one row.

    cache: what it has read, or None; it is written. New tokens are real ones; which of the old were pads it knows.
    """

    def __init__(self, model: nn.Module, cache: BMojoCache | None):
        # By name, not by class: code loaded with trust_remote_code has classes of its own, and adapters wrap the model.
        self.body = next(module for module in model.modules() if type(module).__name__ == "BMojoModel")
        self.config, self.dtype = model.config, model.dtype
        self.cache = cache

    def read(self, ids: torch.Tensor) -> None:
        for part in ids.split(READ_AT_ONCE) if len(ids) else ():
            self._forward(part)

    def _forward(self, ids: torch.Tensor, **options):
        out = self.body(input_ids=ids[None], cache=self.cache, use_cache=True, **options)
        self.cache = cache_of(out)
        return out

    def _weights(self, ids: torch.Tensor):
        """Yield (position of the first query, weights `[L, H, Q, S]`) of a few tokens at a time, and read them."""
        done, heads = 0, len(_attending(self.config)) * self.config.num_attention_heads
        while done < len(ids):
            seen = 0 if self.cache is None else int(self.cache.seen[0])
            part = ids[done : done + max(WEIGHT_BYTES // (heads * (seen + 1) * self.dtype.itemsize), 1)]
            out = self._forward(part, output_attentions=True)
            yield seen, torch.stack([weights[0] for weights in out.attentions]).float()
            done += len(part)

    def neutral(self, text: torch.Tensor) -> torch.Tensor:
        """Return the mean weight `[L, H, S]` that the S tokens of a text get from tokens of it in random order."""
        upto = len(text)
        drawn = torch.randint(len(text), (NEUTRAL,), generator=torch.Generator().manual_seed(0))
        total = 0.0
        for _, weights in self._weights(text[drawn.to(text.device)]):
            weights = weights[..., :upto].sum(2)
            total = total + nn.functional.pad(weights, (0, upto - weights.shape[-1]))
        return total / NEUTRAL

    def votes(self, queries: torch.Tensor, neutral: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the votes of queries: positions and weights `[A, L, H]`, and `[A, L]` of what went beyond."""
        found = []
        for first, weights in self._weights(queries):
            upto = neutral.shape[-1]
            place = torch.arange(weights.shape[-1], device=weights.device)
            now = torch.arange(first, first + weights.shape[2], device=weights.device)[:, None]
            weights = weights.masked_fill(place > now - self.config.window_size, 0.0)
            beyond = weights.sum(-1).mean(1)
            weights = weights[..., :upto]
            more = (weights - neutral[..., None, : weights.shape[-1]]).clamp(min=0)
            more[..., :SINKS] = 0
            most = more.max(dim=-1)
            found.append([most.indices.permute(2, 0, 1), most.values.permute(2, 0, 1), beyond.T])
        return tuple(torch.cat(parts).cpu() for parts in zip(*found))


def _spans(votes: torch.Tensor) -> list[tuple[int, int]]:
    """Return first and last voted token of the passages, `votes` `[S]` in shares: around the token with the most votes
    near it, then around the next."""
    rest, found = votes.clone(), []
    while True:
        near = nn.functional.avg_pool1d(rest[None], 2 * AROUND + 1, 1, AROUND)[0] * (2 * AROUND + 1)
        best = int(near.argmax())
        if near[best] < LEAST and found:
            return found
        low, high = max(best - AROUND, 0), best + AROUND + 1
        voted = rest[low:high].nonzero().flatten()
        found.append((low + int(voted[0]), low + int(voted[-1])))
        rest[low:high] = 0
        if not bool(rest.any()):
            return found


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans from left to right; those that lie close together are one."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if joined and first - joined[-1][1] <= JOIN + 1:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return joined


def _check_arguments(model, input_ids, start, cache, attention_mask, row) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind != "bmojo" or set(model.config.layer_types) == {"linear_attention"}:
        raise ValueError(f"model={type(model).__name__}: must be a B'MOJO model with attention layers; pass one.")
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError("input_ids: must be a tensor [batch, tokens], not empty; pass text and answer together.")
    batch, columns = input_ids.shape
    if type(start) is not int or not 1 <= start < columns:
        raise ValueError(
            f"start={start!r}: must be a column of input_ids with something before it, 1 to {columns - 1}; give the "
            "length of the prompt."
        )
    if not -batch <= row < batch:
        raise ValueError(f"row={row}: input_ids has {batch} rows; rows count from 0.")
    shape = None if attention_mask is None else tuple(attention_mask.shape)
    if shape is not None and (len(shape) != 2 or shape[0] != batch or shape[1] > columns):
        raise ValueError(f"attention_mask: {list(shape)} for input_ids {[batch, columns]}; pass those of input_ids.")
    if cache is None:
        return
    if cache.seen is None:
        raise ValueError("cache: is empty; leave it out, or let the model read with it first.")
    if len(cache.seen) != batch:
        raise ValueError(f"cache: has {len(cache.seen)} rows but input_ids {batch}; pass what the model was given.")
    known = cache.get_seq_length()
    if known >= start:
        raise ValueError(
            f"cache: has read {known} columns, and the answer begins at start={start}; pass a copy of it from before "
            "the question (copy.deepcopy), at least one token short of the answer."
        )
    if attention_mask is not None:
        behind = max(known - attention_mask.shape[1], 0)
        cache.check_mask(nn.functional.pad(attention_mask[:, :known].long(), (0, behind), value=1))
    elif int(cache.seen[row]) != known:
        raise ValueError(
            f"attention_mask: row {row} has {known - int(cache.seen[row])} pads among the {known} columns that the "
            "cache has read; pass the mask that the model was given."
        )


__all__ = ["Attribution", "Passage", "attribute"]
