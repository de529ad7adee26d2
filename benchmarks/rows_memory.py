"""Row "innovation": innovation + expiry of one layer, as a share of what reading the text costs that layer.

Theirs is the prefill, with a cache, of one decoder layer of SmolLM2-135M's sizes (W=512, M=64, F=1; random weights, no
vocabulary to speak of), which does the same innovation + expiry inside: so the ratio is a share of the prefill.

Shapes: T tokens, E = 576 channels of the SSM output.
"""

import math
from collections.abc import Iterator

import torch

from modeling_bmojo import BMojoConfig, BMojoForCausalLM, memory_ops
from tests.oracles import oracle_eidetic, oracle_output_innovation

from . import adapters
from .models import random_ids
from .row import Check, Context, Figure, Row, difference, figure
from .timing import Action, Rounds


LAYER = dict(
    vocab_size=64,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=1,
    num_attention_heads=9,
    num_key_value_heads=3,
    ssm_gated=False,
    ssm_norm=False,
    ssm_conv_act="linear",
    tie_word_embeddings=True,
)
WINDOW, SLOTS = 512, 64
TOKENS, QUICK_TOKENS = (2048, 8192, 32768, 131072), (1024, 2048)
ROUNDS = {131072: Rounds(least=3, most=3, budget=60)}


def outputs(tokens: int) -> torch.Tensor:
    """SSM outputs `[1, T, E]`: a slowly moving average with noise on it, so that some tokens surprise."""
    noise = torch.randn(1, tokens, LAYER["hidden_size"], generator=torch.Generator().manual_seed(0))
    return noise + 0.5 * noise.roll(1, 1) + 0.25 * noise.roll(2, 1)


def ours(tokens: int) -> Action:
    y = outputs(tokens)

    def decide() -> tuple:
        with torch.inference_mode():
            return adapters.innovation_and_expiry(y, WINDOW, SLOTS)

    return decide


def prefill(tokens: int) -> Action:
    """Read T tokens with one layer, from embedding to logits of the last."""
    torch.manual_seed(0)
    model = BMojoForCausalLM(BMojoConfig(**LAYER, window_size=WINDOW, eidetic_size=SLOTS)).eval()
    ids = random_ids(LAYER["vocab_size"], tokens)

    def read() -> object:
        with torch.inference_mode():
            return model(ids, use_cache=True, logits_to_keep=1)

    return read


def checks(context: Context) -> list[Check]:
    """Return innovations against a loop over tokens; expiries against the streaming rule and, at length, against a
    heap."""
    y = outputs(300).double()
    innovation, selection = adapters.innovation_and_expiry(y, 16, 8)
    largest = difference(innovation[0], oracle_output_innovation(y[0], adapters.TAPS))
    found = [Check("innovation, 300 tokens, float64, against the loop", largest, 1e-10)]
    _, expiry = oracle_eidetic(innovation[0].tolist(), 16, 8)
    found.append(Check("expiry, 300 tokens, W=16, M=8, tokens unlike the streaming rule", unlike(selection, expiry), 0))
    tokens = 2048 if context.quick else 32768
    innovation, selection = adapters.innovation_and_expiry(outputs(tokens), WINDOW, SLOTS)
    expiry = memory_ops.heap_expiry(innovation[0].tolist(), WINDOW, SLOTS)
    return [*found, Check(f"expiry, {tokens:,} tokens, tokens unlike the heap", unlike(selection, expiry), 0)]


def unlike(selection: memory_ops.Selection, expiry: list[float]) -> float:
    """How many of the T tokens expire at another time; what happens after query T - 1 is not decided yet."""
    tokens = len(expiry)
    decided = [time if time < tokens else math.inf for time in expiry]
    found = [time if time < tokens else math.inf for time in selection.expiry[0].tolist()]
    return float(sum(mine != wanted for mine, wanted in zip(found, decided, strict=True)))


def figures(context: Context) -> Iterator[Figure]:
    for tokens in QUICK_TOKENS if context.quick else TOKENS:
        rounds = ROUNDS.get(tokens, Rounds(least=3, budget=20))
        seconds = context.alternate({"ours": ours(tokens), "layer": prefill(tokens)}, rounds)
        goal = context.goal(f"innovation {tokens}")
        yield figure(
            "innovation + expiry", "prefill of that layer", tokens, seconds["ours"], seconds["layer"], goal=goal
        )


TITLE = "innovation + expiry, one layer, as a share of the layer's prefill, W=512, M=64, fp32"
ROWS = [Row("innovation", TITLE, checks, figures)]
