"""Tasks that bind keys to values: MQAR, MQAR whose keys change their value, recall with noise, fuzzy recall.

Sources: MQAR (Zoology, arXiv 2312.04927), forgetting MQAR (the Zoology repository), in-context, noisy and fuzzy recall
(MAD, arXiv 2403.17844), the latter two with every repeated key scored. Scored tokens alone are trained on, in all.
"""

from dataclasses import dataclass

import torch

from .samples import IGNORED, Samples, Task, distinct, tokens, weighted


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """N pairs of key and value, then the keys again among random tokens: after each, its value is due.

    Keys come from the lower half of the vocabulary, values from the upper. The place of a key's query is one of the
    S = (T - context) / 2 even places behind the pairs, number i = 1 ... S with weight i^(power - 1): as published, 0.01
    puts most queries near the pairs, 1 all alike. The random tokens between are of the whole vocabulary but the
    sample's keys: with a small vocabulary those would often stand there with another token behind them.
    """

    about = "multi-query associative recall: N pairs, then each key asked once"

    vocabulary: int = 8192
    pairs: int = 8
    power: float = 0.01

    @property
    def updates(self) -> int:
        """How many keys get another value."""
        return 0

    @property
    def context(self) -> int:
        """Tokens of the pairs, in front."""
        return 2 * (self.pairs + self.updates)

    def check(self) -> None:
        if self.pairs < 1:
            self.refuse("pairs", "must be at least 1")
        if self.power <= 0:
            self.refuse("power", "must be above 0; 1 asks at all distances alike, 0.01 mostly near")
        half = self.vocabulary // 2
        if self.pairs > half - 1 - (self.updates > 0):
            self.refuse("vocabulary", f"half of it must hold {self.pairs} distinct keys; give a larger one")
        least = self.context + 2 * self.pairs
        if self.length < least or self.length % 2:
            self.refuse("length", f"must be even and hold {self.context} tokens of pairs and {self.pairs} queries at "
                        f"even places: {least} at least; give more, or fewer pairs")  # fmt: skip

    def sample(self, count: int, generator: torch.Generator) -> Samples:
        half = self.vocabulary // 2
        keys = distinct(count, 1, half, self.pairs, generator)
        values = distinct(count, half, self.vocabulary, self.pairs, generator)
        ids = tokens(count, self.length, 0, self.vocabulary, generator)
        is_key = (ids[:, :, None] == keys[:, None, :]).any(dim=2)
        ids = torch.where(is_key, tokens(count, self.length, half, self.vocabulary, generator), ids)
        ids[:, 0 : 2 * self.pairs : 2], ids[:, 1 : 2 * self.pairs : 2] = keys, values
        values = self._update(ids, keys, values, generator)
        space = (self.length - self.context) // 2
        weights = torch.arange(1, space + 1, dtype=torch.float64) ** (self.power - 1)
        places = self.context + 2 * weighted(count, weights, self.pairs, generator)
        labels = torch.full_like(ids, IGNORED).scatter(1, places, values)
        return Samples(ids.scatter(1, places, keys), labels)

    def _update(
        self, ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Write what changes the keys' values into `ids`, and return the values that hold then, `[n, N]`."""
        return values


@dataclass(frozen=True, kw_only=True)
class ForgettingMQAR(MQAR):
    """MQAR in which half of the keys come again behind all pairs, with another value: the last one counts."""

    about = "MQAR in which half of the keys change their value: the latest counts"

    @property
    def updates(self) -> int:
        return self.pairs // 2

    def check(self) -> None:
        if self.pairs < 2:
            self.refuse("pairs", "must be at least 2, so that half of them can change their value")
        super().check()

    def _update(
        self, ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        half, size = self.vocabulary // 2, self.updates
        which = distinct(len(ids), 0, self.pairs, size, generator)
        old = values.gather(1, which)
        new = tokens(len(ids), size, half, self.vocabulary - 1, generator)
        new = new + (new >= old)  # one of the other values, all alike likely
        ids[:, 2 * self.pairs : self.context : 2] = keys.gather(1, which)
        ids[:, 2 * self.pairs + 1 : self.context : 2] = new
        return values.scatter(1, which, new)


@dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Pairs of key and value all along, each key with one value per sample: from its second time on it is due.

    noise: share of the pairs that are two noise tokens instead, of a vocabulary of their own (`noise_vocabulary`, the
    top of `vocabulary`). The last pair is a key that came before.
    """

    about = "in-context recall: pairs all along, every repeated key scored"

    noise: float = 0.0
    noise_vocabulary: int = 0

    @property
    def real(self) -> int:
        """Tokens that are keys (lower half) or values (upper half)."""
        return self.vocabulary - self.noise_vocabulary

    def check(self) -> None:
        if self.length < 4 or self.length % 2:
            self.refuse("length", "must be even and at least 4: two pairs")
        if not 0 <= self.noise < 1:
            self.refuse("noise", "must be a share of the pairs, 0 <= noise < 1")
        if self.noise_vocabulary < (self.noise > 0):
            self.refuse("noise_vocabulary", "must be at least 1 where there is noise")
        if self.real < 4:
            self.refuse("vocabulary", f"must leave 4 tokens beside noise_vocabulary={self.noise_vocabulary}")

    def sample(self, count: int, generator: torch.Generator) -> Samples:
        pairs, half = self.length // 2, self.real // 2
        keys = tokens(count, pairs, 0, half, generator)
        table = tokens(count, half, half, self.real, generator)
        noisy = torch.rand(count, pairs, generator=generator) < self.noise
        first = tokens(count, 1, 0, pairs - 1, generator)  # a pair that is real and comes again at the end
        keys[:, -1:] = keys.gather(1, first)
        noisy = noisy.scatter(1, first, False)
        noisy[:, -1] = False
        values = table.gather(1, keys)
        again = seen_before(keys, ~noisy) & ~noisy
        labels = torch.full((count, self.length), IGNORED)
        labels[:, 0::2] = torch.where(again, values, IGNORED)
        ids = torch.stack([keys, values], dim=2).flatten(1)
        if self.noise:
            noise = tokens(count, self.length, self.real, self.vocabulary, generator)
            ids = torch.where(noisy.repeat_interleave(2, dim=1), noise, ids)
        return Samples(ids, labels)


@dataclass(frozen=True, kw_only=True)
class NoisyRecall(Recall):
    """`Recall` with noise."""

    about = "in-context recall with noise between the pairs"

    vocabulary: int = 32
    noise: float = 0.2
    noise_vocabulary: int = 16


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(Task):
    """`Recall` whose keys are 1 to `key_tokens` tokens, and its values 1 to `value_tokens`, distinct within each.

    All tokens of a repeated key's value are scored. Key tokens are the lower half of the vocabulary, value tokens the
    upper, so a key ends where a value begins.
    """

    about = "in-context recall of keys and values of one to three tokens"

    key_tokens: int = 3
    value_tokens: int = 3

    def check(self) -> None:
        half = self.vocabulary // 2
        for field in ("key_tokens", "value_tokens"):
            if not 1 <= getattr(self, field) <= half:
                self.refuse(field, f"must be 1 to {half}, half of the vocabulary, because its tokens are distinct")
        if half**self.key_tokens > 4096:
            self.refuse("vocabulary", f"{half} ** {self.key_tokens} keys are more than 4,096; give a smaller one")
        least = 4 * (self.key_tokens + self.value_tokens)
        if self.length < least:
            self.refuse("length", f"must hold four keys with their values: {least} at least")

    def sample(self, count: int, generator: torch.Generator) -> Samples:
        half, pairs = self.vocabulary // 2, self.length // 2
        keys, sizes = self._motifs(count, pairs, 0, half, self.key_tokens, generator)
        radix = (half + 1) ** torch.arange(self.key_tokens)
        codes = ((keys + 1) * (keys >= 0) * radix).sum(dim=2)
        table, lengths = self._motifs(
            count, (half + 1) ** self.key_tokens, half, self.vocabulary, self.value_tokens, generator
        )
        values = table.gather(1, codes[..., None].expand(-1, -1, self.value_tokens))
        again = seen_before(codes, torch.ones_like(codes, dtype=torch.bool))
        due = torch.where(again[..., None], values, -1)
        return self._laid_out(keys, values, due, sizes, lengths.gather(1, codes))

    def _motifs(self, count: int, pairs: int, low: int, high: int, most: int, generator: torch.Generator):
        """Return `[n, P, most]` distinct tokens, -1 behind the motif's end, and the sizes `[n, P]`, 1 to `most`."""
        found = distinct(count * pairs, low, high, most, generator).reshape(count, pairs, most)
        sizes = tokens(count, pairs, 1, most + 1, generator)
        return found.masked_fill(torch.arange(most) >= sizes[..., None], -1), sizes

    def _laid_out(self, keys, values, due, sizes, lengths) -> Samples:
        """Put pairs one behind the other into T places; what leaves them is cut off."""
        count, spare = len(keys), self.key_tokens + self.value_tokens
        start = (sizes + lengths).cumsum(dim=1) - sizes - lengths
        ids, labels = torch.zeros(count, self.length + 1, dtype=torch.long), None
        labels = torch.full_like(ids, IGNORED)
        for offset in range(spare):
            is_key = offset < self.key_tokens
            source = keys[..., offset] if is_key else values[..., offset - self.key_tokens]
            place = start + offset if is_key else start + sizes + offset - self.key_tokens
            place = place.masked_fill(source < 0, self.length).clamp(max=self.length)
            ids.scatter_(1, place, source)
            if not is_key:  # due at the token before
                wanted = due[..., offset - self.key_tokens]
                labels.scatter_(1, torch.where(wanted < 0, self.length, place - 1), wanted)
        return Samples(ids[:, :-1].contiguous(), labels[:, :-1].contiguous())


def seen_before(keys: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return `[n, P]` bool: whether an earlier pair that is `real` has the same key."""
    same = (keys[:, :, None] == keys[:, None, :]) & real[:, None, :]
    return same.tril(diagonal=-1).any(dim=2)
