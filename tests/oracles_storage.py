"""The storage as a loop over single tokens, written from docs/model.md ("Storage"), not from the package.

One row, one layer, no padding, float64. Tokens are numbers; every set is a Python set. Shapes: T tokens, H query heads,
G key/value heads, D head dim.
"""

import math

import torch

from tests.oracles import rotate


STEPS = 1024  # scores are compared in steps of 1/1024 nat; of equals the older token is first


def first_of(wanted, count):
    """The first `count` tokens by (wanted descending, token ascending). wanted: token -> number."""
    order = sorted(wanted, key=lambda s: (-round(wanted[s] * STEPS), s))
    return set(order[:count])


def shown_blocks(t, window, size, shown, distance=None, start=0):
    """(first token, number of tokens) of every block that query t sees: each token beyond the window is in at most one.

    The newest `shown` blocks of each level, and one more where its pair is not complete; none that begins further away
    than the distance, which holds from query `start` on.
    """
    distance = None if t < start else distance
    found = []
    age = 0  # how much older than the window a block's last token is when the block joins this level
    while size <= t:
        older = age + shown * size
        number = 0
        while (number + 1) * size - 1 + window + age <= t:
            pair_ends = (number // 2 + 1) * 2 * size - 1
            if t < pair_ends + window + older and (distance is None or t - number * size <= distance):
                found.append((number * size, size))
            number += 1
        age, size = older, 2 * size
    return found


class OracleStorage:
    """What one layer's queries see beyond the window, and their attention.

    Args:
        query `[T, H, D]`, keys, values `[T, G, D]`: without positions. eidetic: by token t the set of eidetic tokens.
        fetched K, candidates C or None, sketch None or (P, U, m, c), decay, surprise `[T]` (E), limit N or None,
        blocks F (0: none), size b, distance D_max or None, which holds from query `start` on, theta of RoPE, scaling
        sigma.
    """

    def __init__(
        self, query, keys, values, window, eidetic, fetched, candidates=None, sketch=None, decay=0.0, surprise=None,
        limit=None, blocks=0, size=1, distance=None, start=0, theta=10000.0, scaling=1.0,
    ):  # fmt: skip
        self.__dict__.update(locals())
        self.repeat = query.shape[1] // keys.shape[1]
        self.seen = []  # by token: by group the fetched tokens

    def turned(self, x, position):
        return rotate(x[None], position, self.theta, torch.float32)[0]

    def score(self, t, s, h):
        apart = t - s if self.distance is None or t < self.start else min(t - s, self.distance)
        return self.scaling * self.turned(self.query[t, h], apart) @ self.keys[s, h // self.repeat]

    def guess(self, t, s, h):
        """The score as the sketch has it."""
        (key_projection, query_projection, center, scale), g = self.sketch, h // self.repeat
        z = torch.clamp(torch.round((self.keys[s, g] - center[g]) @ key_projection[g] / scale[g]), -127, 127) * scale[g]
        return self.scaling * (self.turned(self.query[t, h], self.window) @ query_projection[g]) @ z

    def choose(self, t, g, tokens, score, count):
        wanted = {}
        for s in tokens:
            heads = [score(t, s, h) for h in range(g * self.repeat, (g + 1) * self.repeat)]
            wanted[s] = max(float(head) for head in heads)
            if self.decay:
                wanted[s] += self.decay * float(self.surprise[s] - self.surprise[t - self.window])
        return first_of(wanted, count)

    def fetch(self, t, g):
        stored = {s for s in range(t - self.window + 1) if s not in self.eidetic[t]}
        if self.limit is not None:
            stored = {s for s in stored if s > t - self.window - self.limit}
        if self.candidates is not None:
            stored = self.choose(t, g, stored, self.guess, self.candidates)
        return self.choose(t, g, stored, self.score, self.fetched)

    def attend(self, t, h):
        g = h // self.repeat
        fetched = self.fetch(t, g)
        if h % self.repeat == 0:
            self.seen.append(fetched)
        tokens = set(range(max(0, t - self.window + 1), t + 1)) | self.eidetic[t] | fetched
        logits = [self.score(t, s, h) for s in sorted(tokens)]
        values = [self.values[s, g] for s in sorted(tokens)]
        blocks = shown_blocks(t, self.window, self.size, self.blocks, self.distance, self.start) if self.blocks else []
        for first, size in blocks:
            inside = range(first, first + size)
            rest = size - len(tokens & set(inside))
            if rest == 0:
                continue
            key = torch.stack([self.turned(self.keys[s, g], s) for s in inside]).mean(dim=0)
            logits.append(self.scaling * self.turned(self.query[t, h], t) @ key + math.log(rest))
            values.append(torch.stack([self.values[s, g] for s in inside]).mean(dim=0))
        return torch.softmax(torch.stack(logits), dim=0) @ torch.stack(values)

    def run(self):
        tokens, heads = self.query.shape[:2]
        return torch.stack([torch.stack([self.attend(t, h) for h in range(heads)]) for t in range(tokens)])
