"""Row "peers": a hybrid of transformers against ours of equal size, both in plain torch, random weights.

FalconH1 is the nearest relative: attention and a Mamba-2 side by side in every layer, but with full attention. Both
get SmolLM2-135M's sizes (30 layers of 576, 9 heads of 64 on 3, MLP 1,536) and a gated SSM of 9 heads of 64, N=64.
"""

from collections.abc import Iterator

import torch
from transformers import FalconH1Config, FalconH1ForCausalLM

from modeling_bmojo import CACHE_NAME, BMojoConfig, BMojoForCausalLM, cache_of

from .actions import SIDES, per_token, prefill, steps
from .models import random_ids
from .row import Check, Context, Figure, Row, difference, figure
from .timing import Rounds


SIZES = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
)
QUICK_SIZES = dict(SIZES, vocab_size=512, num_hidden_layers=2)
FALCON = dict(
    mamba_d_ssm=576, mamba_n_heads=9, mamba_d_head=64, mamba_n_groups=3, mamba_d_state=64, mamba_rms_norm=False
)
TOKENS, QUICK_TOKENS = (512, 2048), (512,)


def models(quick: bool) -> dict[str, torch.nn.Module]:
    sizes = QUICK_SIZES if quick else SIZES
    torch.manual_seed(0)
    theirs = FalconH1ForCausalLM(FalconH1Config(**sizes, **FALCON))
    ours = BMojoForCausalLM(BMojoConfig(**sizes, ssm_gated=True, ssm_norm=False))
    return {"ours": ours.eval(), "theirs": theirs.eval()}


@torch.inference_mode()
def checks(context: Context) -> list[Check]:
    """They have no weights in common, so each is checked against itself: a step is the next token of a prefill."""
    found = []
    for side, model in models(quick=True).items():
        ids = random_ids(model.config.vocab_size, 700)
        cache = cache_of(model(ids[:, :-1], use_cache=True, logits_to_keep=1))
        step = model(ids[:, -1:], **{CACHE_NAME: cache}, use_cache=True).logits
        largest = difference(step, model(ids, use_cache=False, logits_to_keep=1).logits)
        found.append(Check(f"{side}: token 700 by a step against all at once", largest, 1e-3))
    return found


def figures(context: Context) -> Iterator[Figure | str]:
    pair = models(context.quick)
    sizes = {side: sum(parameter.numel() for parameter in model.parameters()) for side, model in pair.items()}
    yield f"parameters: ours {sizes['ours'] / 1e6:.1f} million, FalconH1 {sizes['theirs'] / 1e6:.1f} million"
    for tokens in QUICK_TOKENS if context.quick else TOKENS:
        reads = {side: prefill(model, tokens) for side, model in pair.items()}
        seconds = context.alternate(reads, Rounds(least=3, most=5, budget=30))
        yield figure("prefill", "FalconH1", tokens, seconds["ours"], seconds["theirs"])
        caches = {side: cache_of(read()) for side, read in reads.items()}
        tries = {side: steps(pair[side], caches[side]) for side in SIDES}
        seconds = per_token(context.alternate(tries, Rounds(least=5, most=15, budget=15)))
        yield figure("one decoding step", "FalconH1", tokens, seconds["ours"], seconds["theirs"])


ROWS = [Row("peers", "transformers' FalconH1 of equal size, random weights, torch path, fp32", checks, figures)]
