"""Passkey retrieval: a number hidden in real text, asked for at the end.

    [real text ...] The pass key is 48213. Remember it. [... real text] What is the pass key? The pass key is 48213

A prompt has `length` tokens up to the question's end; `depth` in [0, 1] is where in the text the needle stands, and
`distance` the tokens between the needle and the first digit that is asked for. The digits are given to the model one
after the other: it retrieves the key if every digit is its first choice, which is exactly what greedy decoding needs.
Numbers and stretches of text follow from the seed. An answer inside the window proves nothing: results are by distance.
"""

import math
import random
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from modeling_bmojo import CACHE_NAME, cache_of

from ..common.nll import in_pieces


NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"


class Prompt(NamedTuple):
    """ids: `[1, T]`, the key included. digits: places in ids of the tokens that spell the key."""

    ids: torch.Tensor
    digits: list[int]
    length: int
    depth: float
    distance: int


def make_prompts(
    tokenizer: Any,
    text: torch.Tensor,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    digits: int,
    seed: int,
) -> list[Prompt]:
    """`trials` prompts for every length and depth.

    Args:
        text: `[S]` ids of real text that the needle is hidden in.

    Raises:
        ValueError: the text is shorter than the longest prompt, a prompt has no room for needle and question, or the
            tokenizer cannot spell numbers.
    """
    prompts = []
    for length in lengths:
        for depth in depths:
            for trial in range(trials):
                chance = random.Random(f"{seed} {length} {depth} {trial}")
                key = "".join(chance.choice("0123456789") for _ in range(digits))
                prompts.append(_prompt(tokenizer, text, length, depth, key, chance))
    return prompts


def _prompt(tokenizer: Any, text: torch.Tensor, length: int, depth: float, key: str, chance: random.Random) -> Prompt:
    needle, question = _encode(tokenizer, NEEDLE.format(key=key)), _encode(tokenizer, QUESTION)
    answer, spelled = _answer(tokenizer, question, key)
    room = length - len(needle) - len(question)
    if room < 2:
        least = len(needle) + len(question) + 2
        raise ValueError(f"passkey_lengths: {length} tokens have no room for needle and question; at least {least}.")
    if len(text) < room:
        raise ValueError(f"passkey_lengths: {length} tokens need more text than the {len(text):,} tokens given.")
    start = chance.randrange(len(text) - room + 1)
    filler, before = text[start : start + room].tolist(), round(depth * room)
    ids = filler[:before] + needle + filler[before:] + question + answer
    first = length + spelled[0]
    distance = first - (before + len(needle))
    return Prompt(torch.tensor([ids]), [length + place for place in spelled], length, depth, distance)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _answer(tokenizer: Any, question: list[int], key: str) -> tuple[list[int], list[int]]:
    """Return tokens of the key behind the question, and which of them hold its digits (a leading space may be one
    alone)."""
    whole = _encode(tokenizer, f"{QUESTION} {key}")
    if whole[: len(question)] != question:
        raise ValueError("passkey: this tokenizer joins the question's end and the key; switch passkey off.")
    answer = whole[len(question) :]
    spelled = [index for index, token in enumerate(answer) if any(c.isdigit() for c in tokenizer.decode([token]))]
    if "".join(tokenizer.decode([answer[index]]) for index in spelled).strip().replace(" ", "") != key:
        raise ValueError(f"passkey: this tokenizer does not spell {key!r} (it reads back other); switch passkey off.")
    return answer, spelled


@torch.inference_mode()
def score_prompts(
    model: torch.nn.Module, prompts: Sequence[Prompt], chunk: int, bar: Any = None
) -> list[dict[str, Any]]:
    """Per prompt: its length, depth and distance, `found` (all digits first choice) and the digits' mean `nll`."""
    results = []
    for prompt in prompts:
        logits, first = _last_logits(model, prompt, chunk), prompt.digits[0] - 1
        places = torch.tensor(prompt.digits)
        asked, told = logits[places - 1 - first], prompt.ids[0, places]
        found = bool((asked.argmax(-1) == told).all())
        nll = cross_entropy(asked, told).item()
        if not math.isfinite(nll):
            where = f"length {prompt.length}, depth {prompt.depth}"
            raise ValueError(f"the model's NLL of a passkey is not finite ({where}).")
        results.append(
            {"length": prompt.length, "depth": prompt.depth, "distance": prompt.distance, "found": found, "nll": nll}
        )
        if bar is not None:
            bar.update(prompt.ids.shape[1])
    return results


def _last_logits(model: torch.nn.Module, prompt: Prompt, chunk: int) -> torch.Tensor:
    """Return logits `[n, V]` on the CPU, float32, of the tokens from the one before the first digit on."""
    ids = prompt.ids.to(next(model.parameters()).device)
    end = prompt.digits[0] - 1
    cache = cache_of(deque(in_pieces(model, ids[:, :end], chunk, logits_to_keep=1), maxlen=1).pop())
    return model(input_ids=ids[:, end:], **{CACHE_NAME: cache}, use_cache=True).logits[0].float().cpu()


def by_distance(results: Sequence[dict[str, Any]], window: int) -> dict[str, dict[str, float]]:
    """Accuracy and mean NLL by the needle's distance in windows; empty classes are left out.

    Beyond W no token of the needle is visible where the first digit is asked for (distance >= W).
    """
    bounds = {"inside W": (0, window), "W to 4W": (window, 4 * window), "beyond 4W": (4 * window, math.inf)}
    classes = {}
    for name, (nearest, farthest) in bounds.items():
        hits = [result for result in results if nearest <= result["distance"] < farthest]
        if hits:
            accuracy = sum(hit["found"] for hit in hits) / len(hits)
            nll = sum(hit["nll"] for hit in hits) / len(hits)
            classes[name] = {"accuracy": accuracy, "nll": nll, "prompts": len(hits)}
    return classes
