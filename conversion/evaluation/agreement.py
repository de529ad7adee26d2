"""How far a model says what its source says: equal next tokens, and how long both write the same text.

Teacher-forced: at every place of a text, is the likeliest next token the source's? Greedy: both go on from the end of
the text by themselves; the equal prefix ends at the first token that differs. End-of-sequence tokens do not stop them.
"""

import torch

from modeling_bmojo import CACHE_NAME, cache_of

from ..common.nll import Reading, bucket_means


@torch.inference_mode()
def continue_greedily(model: torch.nn.Module, reading: Reading, steps: int) -> list[int]:
    """Return the `steps` tokens that the model writes after the text; moves `reading.cache` on."""
    device, cache, written = next(model.parameters()).device, reading.cache, [reading.following]
    while len(written) < steps:
        out = model(input_ids=torch.tensor([[written[-1]]], device=device), **{CACHE_NAME: cache}, use_cache=True)
        cache = cache_of(out)
        written.append(int(out.logits[0, -1].argmax()))
    return written


def equal_share(ours: torch.Tensor, theirs: torch.Tensor, window: int) -> dict[str, float]:
    """Share of equal next tokens `[T-1]` by bucket (`nll.buckets`)."""
    return bucket_means((ours == theirs).float(), window)


def equal_prefix(ours: list[int], theirs: list[int]) -> int:
    """Return tokens before the first difference."""
    return next((index for index, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
