"""Rows "lookup" and "prefix": what a memory that goes back, or that was kept, saves the graft; W=512, M=64, F=1, fp32.

lookup    generate() of 96 tokens with prompt lookup (ten tokens drafted at a time) against plain greedy decoding, the
          same text. Prompts: copy a paragraph and mend a word of it; list its sentences again.
prefix    the first word of an answer to a question of 20 tokens about a document of T tokens: a kept prefix opened,
          checked and gone on with, its file read from the disk, against reading the document.

Shapes: T tokens.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer

from modeling_bmojo import BMojoForCausalLM

from .models import load, random_ids
from .row import Check, Context, Figure, Row, difference, figure
from .timing import Action, Rounds


DRAFT, NEW, QUICK_NEW, QUESTION = 10, 96, 16, 20
PREFIX, QUICK_PREFIX = (2048, 8192), (128,)
PARAGRAPH = (
    "The harbour of the town lies behind a long wall of grey stones. In the morning the boats come back with the first "
    "light, and the men carry the baskets of fish up the stairs to the market. By noon the stalls are empty, the nets "
    "hang in the sun, and only the cats are left between the barrels. In the evening the lamps along the wall are "
    "lit, one after the other, and the boats go out again."
)
PROMPTS = {
    "editing": f"Text:\n{PARAGRAPH}\n\nThe same text, with 'ships' instead of 'boats':\n",
    "summarising": f"Text:\n{PARAGRAPH}\n\nWhat happens at the harbour, sentence by sentence:\nThe harbour",
}


def ours(context: Context) -> BMojoForCausalLM:
    return load("ours", context.models.path("ours"))


def prompts(context: Context) -> dict[str, torch.Tensor]:
    """Return token ids by name; in a quick run, which has no tokenizer, the same random tokens three times over."""
    if context.quick:
        return {"repeated": random_ids(ours(context).config.vocab_size, 12).repeat(1, 3).clamp(min=3)}
    tokenizer = AutoTokenizer.from_pretrained(context.models.path("ours"))
    return {name: tokenizer(text, return_tensors="pt").input_ids for name, text in PROMPTS.items()}


def answering(model: BMojoForCausalLM, ids: torch.Tensor, count: int, **how: int) -> Action:
    mask = torch.ones_like(ids)

    def answer() -> torch.Tensor:
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **how
        )

    return answer


def lookup_checks(context: Context) -> list[Check]:
    """Return that drafted text is that of plain decoding."""
    model, found = ours(context), []
    for name, ids in prompts(context).items():
        plain = answering(model, ids, QUICK_NEW)()
        drafted = answering(model, ids, QUICK_NEW, prompt_lookup_num_tokens=DRAFT)()
        found.append(Check(f"tokens of {name} that differ", float((plain != drafted).sum()), 0))
    return found


def lookup_figures(context: Context) -> Iterator[Figure | str]:
    model, count = ours(context), QUICK_NEW if context.quick else NEW
    for name, ids in prompts(context).items():
        actions = {
            "ours": answering(model, ids, count, prompt_lookup_num_tokens=DRAFT),
            "theirs": answering(model, ids, count),
        }
        seconds = context.alternate(actions, Rounds(least=3, most=5, budget=60))
        goal = context.goal("prompt lookup")
        yield figure(f"prompt lookup, {name}", "plain decoding", ids.shape[1], *seconds.values(), goal=goal)


def known(model: BMojoForCausalLM, folder: str, ids: torch.Tensor) -> Action:
    """Open the folder and go on behind what it knows; its files come from the disk, not from memory."""

    def answer() -> torch.Tensor:
        for path in Path(folder).iterdir():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return first_word(model, ids, model.prefix_memory(folder))

    return answer


def first_word(model: BMojoForCausalLM, ids: torch.Tensor, prefixes=None) -> torch.Tensor:
    """Return the logits of the first token behind a prompt."""
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, output_logits=True, pad_token_id=0,
        return_dict_in_generate=True, prefix_memory=prefixes,
    )  # fmt: skip
    return found.logits[0]


def prefix_checks(context: Context) -> list[Check]:
    """Return that the first word behind a kept prefix is the one that reading gives."""
    model = ours(context)
    tokens = model.config.window_size + 60
    ids = random_ids(model.config.vocab_size, tokens + QUESTION)
    with tempfile.TemporaryDirectory() as folder:
        model.prefix_memory(folder).read(ids[:, :tokens])
        kept = known(model, folder, ids)()
    what = f"logits behind a kept prefix of {tokens} tokens (> W)"
    return [Check(what, difference(kept, first_word(model, ids)), 1e-3)]


def prefix_figures(context: Context) -> Iterator[Figure | str]:
    model = ours(context)
    for tokens in QUICK_PREFIX if context.quick else PREFIX:
        ids = random_ids(model.config.vocab_size, tokens + QUESTION)
        with tempfile.TemporaryDirectory() as folder:
            prefixes = model.prefix_memory(folder)
            prefixes.read(ids[:, :tokens])
            note = f"a file of {prefixes.nbytes / 1e6:,.1f} MB"
            actions = {"ours": known(model, folder, ids), "theirs": lambda ids=ids: first_word(model, ids)}
            rounds = Rounds(least=3, most=5, budget=60, warm=tokens < 4096)
            seconds = context.alternate(actions, rounds)
        goal = context.goal(f"prefix {tokens}")
        yield figure("first word on a kept prefix", "reading it", tokens, *seconds.values(), goal=goal, note=note)


MODELS = "SmolLM2-135M-Instruct's graft (of a random 2-layer Llama in a quick run), fp32"
ROWS = [
    Row("lookup", f"drafting from the prompt; {MODELS}", lookup_checks, lookup_figures),
    Row("prefix", f"going on behind a text that was read once; {MODELS}", prefix_checks, prefix_figures),
]
