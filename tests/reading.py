"""Random tokens, and reading them into a cache in pieces: what tests of memories that are added do."""

import torch

from modeling_bmojo import BMojoCache
from tests.tiny import SIZES


def tokens(count=40, rows=2, seed=1):
    return torch.randint(0, SIZES["vocab_size"], (rows, count), generator=torch.Generator().manual_seed(seed))


def read(model, ids, pieces=None, mask=None, cache=None):
    """Logits of all columns, read in pieces into a cache."""
    cache, found, start = BMojoCache(model.config) if cache is None else cache, [], 0
    with torch.no_grad():
        for size in pieces or [ids.shape[1]]:
            given = None if mask is None else mask[:, : start + size]
            found.append(model(ids[:, start : start + size], attention_mask=given, cache=cache).logits)
            start += size
    return torch.cat(found, dim=1), cache
