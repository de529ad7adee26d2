"""RULER's tasks as prompts of a length, read and answered by a model; scores with their intervals.

    length >= tokens of the prompt + tokens that its answer may take         (the benchmark's rule)

The size of a task's hay is found by bisection on the tokenizer. A model reads the prompt and goes on greedily behind
the answer's beginning, which is given to it: without, models that were not tuned to chat answer nothing of use. It is
stopped when all that its answer must hold is there, which changes no score, at an end-of-sequence token, or when its
tokens are used up.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from modeling_bmojo import CACHE_NAME, BMojoCache, cache_of

from ..common.nll import in_pieces
from .cost import device_bytes
from .ruler_tasks import TASKS, Hay, Sample, make_sample, score


TEMPLATES = ("none", "chat")


class Prompt(NamedTuple):
    """ids: of the whole prompt, special tokens included. context: how many of them stand before the question."""

    ids: list[int]
    context: int
    answers: tuple[str, ...]
    depths: tuple[int, ...]


class Prompts:
    """Prompts of one text, tokenizer and template; sample `index` of a task and length is always the same.

    Args:
        text: the hay. template: "none" or "chat", the tokenizer's own, in which the answer's beginning is given too.

    Raises:
        ValueError: a tokenizer without a chat template, or one that does not say where its tokens stand.
    """

    def __init__(self, tokenizer: Any, text: str, template: str, seed: int):
        if template == "chat" and not tokenizer.chat_template:
            raise ValueError("ruler_template='chat': the source's tokenizer has no chat template; give 'none'.")
        if not tokenizer.is_fast:
            raise ValueError("ruler: needs a tokenizer of the tokenizers library (is_fast); save the source with one.")
        self.tokenizer, self.hay, self.template, self.seed = tokenizer, Hay(text), template, seed
        self._sizes: dict[tuple[str, int], int] = {}

    def facts(self) -> list[Any]:
        """Return what decides the samples beside task and length, as plain data."""
        text = hashlib.sha256(" ".join(self.hay.words).encode()).hexdigest()
        return [text, self.template, self.tokenizer.chat_template if self.template == "chat" else None, self.seed]

    def make(self, task: str, length: int, index: int) -> Prompt:
        """Return sample `index`, as long as fits into `length` tokens.

        Raises:
            ValueError: no sample of the task fits, or the text holds too little for one.
        """
        size = self._sizes.get((task, length)) or self._fitting(task, length)
        self._sizes[task, length] = size
        while True:  # samples of one size differ by a few tokens
            prompt = self._encode(make_sample(task, self.hay, size, length, self.seed, index))
            if len(prompt.ids) + TASKS[task].new_tokens <= length:
                return prompt
            if size == TASKS[task].least:
                raise _no_room(task, length)
            size = max(TASKS[task].least, size - max(1, size // 100))

    def _fitting(self, task: str, length: int) -> int:
        """Return the largest size whose first sample fits."""
        least, room = TASKS[task].least, length - TASKS[task].new_tokens

        def first(size: int) -> Sample:
            return make_sample(task, self.hay, size, length, self.seed, 0)

        def holds(size: int) -> bool:
            try:
                first(size)
            except ValueError:
                return False
            return True

        def fits(size: int) -> bool:
            return len(self._encode(first(size)).ids) <= room

        first(least)
        if not fits(least):
            raise _no_room(task, length)
        size, above = least, 2 * least
        while holds(above) and fits(above):
            size, above = above, 2 * above
        if not holds(above):
            # Where the hay ends is found without the tokenizer, which takes most of the time.
            most, above = _edge(size, above, holds)
            if fits(most):
                first(above)  # raises: it is the length that must stop, not the hay
            above = most
        return _edge(size, above, fits)[0]

    def _encode(self, sample: Sample) -> Prompt:
        if self.template == "chat":
            asked = [{"role": "user", "content": sample.context + sample.question}]
            text = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            text += sample.prefix.lstrip()
        else:
            text = sample.context + sample.question + sample.prefix
        # A template writes special tokens itself: they must not come twice.
        found = self.tokenizer(
            text, add_special_tokens=self.template == "none", return_offsets_mapping=True, verbose=False
        )
        end = text.find(sample.context) + len(sample.context)
        context = sum(stop <= end for _, stop in found["offset_mapping"])
        return Prompt(found["input_ids"], context, sample.answers, sample.depths)


def _edge(low: int, high: int, good: Callable[[int], bool]) -> tuple[int, int]:
    """Return by bisection (n, n + 1) of which the first is good and the second is not, as `low` and `high` are."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low, high


def _no_room(task: str, length: int) -> ValueError:
    return ValueError(
        f"ruler_lengths: no sample of {task} fits into {length} tokens, {TASKS[task].new_tokens} of which are for its "
        "answer; give longer ones or leave the task out."
    )


@torch.inference_mode()
def answer(model: torch.nn.Module, tokenizer: Any, prompt: Prompt, chunk: int, new_tokens: int) -> tuple[str, Any]:
    """Return what the model says behind the prompt, and its cache.

    Args:
        chunk: tokens read at a time. new_tokens: how many it may write at most.
    """
    device, ends = next(model.parameters()).device, end_tokens(model)
    ids = torch.tensor([prompt.ids], device=device)
    cache = None
    if device.type != "cpu" and getattr(model.config, "storage_size", 0):
        cache = BMojoCache(model.config, storage_on_host=True)
    out = deque(in_pieces(model, ids, chunk, cache=cache, logits_to_keep=1), maxlen=1).pop()
    written, cache = [int(out.logits[0, -1].argmax())], cache_of(out)
    while len(written) < new_tokens and written[-1] not in ends and not _all_there(tokenizer, written, prompt):
        out = model(input_ids=torch.tensor([written[-1:]], device=device), **{CACHE_NAME: cache}, use_cache=True)
        written.append(int(out.logits[0, -1].argmax()))
        cache = cache_of(out)
    return tokenizer.decode(written, skip_special_tokens=True), cache


def solve(model: torch.nn.Module, prompts: Prompts, task: str, length: int, index: int, chunk: int) -> dict[str, Any]:
    """Let a model answer one sample.

    Returns:
        `score`, what it `said`, `depths` of the needles asked for (percent of the hay), `tokens` of the prompt, and
        `bytes` of the cache behind the answer, on the device that computes.
    """
    prompt = prompts.make(task, length, index)
    said, cache = answer(model, prompts.tokenizer, prompt, chunk, TASKS[task].new_tokens)
    return sample_of(prompt, said, device_bytes(cache))


def sample_of(prompt: Prompt, said: str, held: int) -> dict[str, Any]:
    """Return what is kept of an answered prompt; see `solve`."""
    found = {"score": score(said, prompt.answers), "said": said, "depths": list(prompt.depths)}
    return {**found, "tokens": len(prompt.ids), "bytes": held}


def _all_there(tokenizer: Any, written: list[int], prompt: Prompt) -> bool:
    return score(tokenizer.decode(written, skip_special_tokens=True), prompt.answers) == 1.0


def end_tokens(model: torch.nn.Module) -> set[int]:
    """Return the ids that end a text by the model's generation config, or else its config."""
    for config in (getattr(model, "generation_config", None), model.config):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return set()


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95% interval of a share after Wilson (1927); for scores between 0 and 1 it is on the wide side."""
    middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired(ours: Sequence[float], theirs: Sequence[float], z: float = 1.96) -> tuple[float, float, float]:
    """Return the mean difference of scores of the same samples, and its 95% interval after Agresti and Min (2005).

    One pair for us, one for them and two ties, each counted half, are added, so that no interval is empty.
    """
    differences, count = [a - b for a, b in zip(ours, theirs, strict=True)], len(ours) + 2
    middle = sum(differences) / count
    half = z * math.sqrt(((sum(d * d for d in differences) + 1) / count - middle**2) / count)
    return sum(differences) / len(differences), max(-1.0, middle - half), min(1.0, middle + half)
