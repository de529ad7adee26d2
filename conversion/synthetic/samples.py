"""What a task is: samples drawn from a seeded generator, and the streams of seeds that training and tests draw from.

Shapes: n samples of T tokens; ids and labels `[n, T]`. A label stands at the token after which it is due.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


IGNORED = -100  # the label of a token after which nothing is scored; torch's own


class Samples(NamedTuple):
    """ids `[n, T]`: what is read. labels `[n, T]`: what is due next, IGNORED where nothing is scored."""

    ids: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task's sizes, and how its samples are made.

    name: how the results are called. length: T, tokens of a sample. vocabulary: tokens that there are.
    stretch: lengths of the tests, in multiples of `length`; 1 is the length that is trained at.
    """

    about = ""
    whole = False  # whether one output is scored that holds the whole sample, instead of next tokens

    name: str = ""
    length: int = 128
    vocabulary: int = 16
    stretch: tuple[int, ...] = (1,)

    def check(self) -> None:
        """Refuse sizes that no sample fits (ValueError)."""

    def facts(self) -> list[str]:
        """Return what decides the samples beside the fields, as plain data."""
        return []

    def sample(self, count: int, generator: torch.Generator) -> Samples:
        """Return `count` samples."""
        raise NotImplementedError

    def test(self, count: int, seed: int) -> list[tuple[str, Samples, slice]]:
        """Return test samples, each set with how its score is called and which of its positions count for that.

        They belong to the seed and to no step of its training: the stream of tests is one of its own.
        """
        found = []
        for factor in self.stretch:
            task = replace(self, length=factor * self.length)
            samples = task.sample(count, stream(task, "test", seed))
            found.append((f"{task.length:,} tokens", samples, slice(None)))
        return found

    def refuse(self, field: str, rule: str) -> None:
        """Raise the ValueError that names the task, a field and its value, and what must hold."""
        raise ValueError(f"tasks: {self.name}: {field}={getattr(self, field)!r}: {rule}.")


def stream(*names: object) -> torch.Generator:
    """Return the generator that belongs to these names: others for other names, the same in every process.

    So the batch of a step depends on nothing but seed and step, and no test set on what was trained before.
    """
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def distinct(count: int, low: int, high: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Return `[count, size]` tokens of low <= token < high, no two equal in a row, all choices alike likely."""
    return torch.rand(count, high - low, generator=generator).topk(size, dim=1).indices + low


def weighted(count: int, weights: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Return `[count, size]` distinct indices into `weights` `[S]`, drawn one after the other without replacement.

    By the Gumbel trick: the largest of log w + Gumbel noise are such a draw.
    """
    noise = torch.rand(count, len(weights), generator=generator, dtype=torch.float64).clamp(1e-300, 1 - 1e-16)
    return (weights.double().log() - (-noise.log()).log()).topk(size, dim=1).indices


def tokens(count: int, length: int, low: int, high: int, generator: torch.Generator) -> torch.Tensor:
    """Return `[count, length]` tokens of low <= token < high, each drawn by itself."""
    return torch.randint(low, high, (count, length), generator=generator)
