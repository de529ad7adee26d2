"""Rows for a GPU, run with --device cuda: kernels against calling them directly, FlashAttention, and the Transformer.

cuda-scan        chunk scan and convolution against mamba-ssm and causal-conv1d called directly (bf16)
cuda-attention   memory attention, T=16,384, W=512, M=64, F=1, against FlashAttention's sliding window; where flash-attn
                 is not installed, against SDPA, full causal
cuda-decode      one token at 131,072 tokens, batch 16, bf16: the graft against the source
cuda-train       one training step of 1.4 billion parameters, T=8,192, bf16, AdamW, against the Llama of that backbone

Shapes as in the rows for the CPU.
"""

from collections.abc import Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_bmojo import CACHE_NAME, BMojoCache, BMojoConfig, BMojoForCausalLM

from . import adapters, rows_attention, rows_scan
from .actions import SIDES, filled_cache, model_checks, per_token, steps
from .models import load, random_ids
from .row import Check, Context, Figure, Row, difference, figure
from .rows_train import optimizer_of, step
from .timing import Action, Rounds


DTYPE = "bfloat16"
SCAN_TOKENS, HEADS, GROUPS, CONV_CHANNELS, TAPS = 16384, 24, 1, 1664, 4
ATTENTION_TOKENS, WINDOW = 16384, 512
DECODE_TOKENS, DECODE_ROWS, READ_CHUNK = 131072, 16, 4096
TRAIN_TOKENS = 8192
BACKBONE = dict(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=32,
    tie_word_embeddings=True,
    max_position_embeddings=TRAIN_TOKENS,
)


def on_gpu(values, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [value.to("cuda", dtype if value.is_floating_point() else value.dtype) for value in values]


def both_of(seconds: dict[str, list[float]]) -> list[list[float]]:
    return [seconds[side] for side in SIDES]


def scan_actions() -> dict[str, Action]:
    """Chunk scan of both sides; x, B and C in bf16, the rest in fp32."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, A, B, C, D = on_gpu(rows_scan.inputs(SCAN_TOKENS, HEADS, GROUPS), torch.float32)
    x, B, C = on_gpu((x, B, C))
    return {
        "ours": lambda: adapters.scan(x, dt, A, B, C, D)[0],
        "theirs": lambda: mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D),
    }


def conv_actions() -> dict[str, Action]:
    from causal_conv1d import causal_conv1d_fn

    x, weight = on_gpu((torch.randn(1, SCAN_TOKENS, CONV_CHANNELS), torch.randn(CONV_CHANNELS, TAPS)))
    bias = torch.zeros(CONV_CHANNELS, device="cuda", dtype=torch.bfloat16)
    return {
        "ours": lambda: adapters.convolve(x, weight, bias),
        "theirs": lambda: causal_conv1d_fn(x.transpose(1, 2), weight, bias).transpose(1, 2),
    }


@torch.inference_mode()
def scan_checks(context: Context) -> list[Check]:
    pairs = {"chunk scan": scan_actions(), "convolution": conv_actions()}
    return [
        Check(f"{name}, bf16, against the package", difference(pair["ours"]().float(), pair["theirs"]().float()), 2e-2)
        for name, pair in pairs.items()
    ]


@torch.inference_mode()
def scan_figures(context: Context) -> Iterator[Figure | str]:
    pairs = {("chunk scan", "mamba-ssm"): scan_actions(), ("convolution", "causal-conv1d"): conv_actions()}
    for (name, against), pair in pairs.items():
        seconds = context.alternate(pair)
        goal = context.goal("cuda scan" if name == "chunk scan" else "cuda conv")
        yield figure(name, against, SCAN_TOKENS, *both_of(seconds), goal=goal, dtype=DTYPE)


def attention_problem(tokens: int) -> tuple[list[torch.Tensor], tuple]:
    given = rows_attention.problem(tokens)
    selection = adapters.choose(torch.rand(1, tokens, device="cuda"), WINDOW, rows_attention.SLOTS)
    return on_gpu(given[:5]), selection


@torch.inference_mode()
def attention_checks(context: Context) -> list[Check]:
    """bf16 against the same attention in fp32, which the CPU row checks against a dense mask."""
    values, selection = attention_problem(2048)
    fading = rows_attention.FADING
    found = adapters.memory_attention(*values, selection, WINDOW, fading).float()
    wanted = adapters.memory_attention(*[value.float() for value in values], selection, WINDOW, fading)
    return [Check("2,048 tokens, bf16 against fp32", difference(found, wanted), 2e-2)]


@torch.inference_mode()
def attention_figures(context: Context) -> Iterator[Figure | str]:
    values, selection = attention_problem(ATTENTION_TOKENS)
    actions = {"ours": lambda: adapters.memory_attention(*values, selection, WINDOW, rows_attention.FADING)}
    try:
        from flash_attn import flash_attn_func

        label = "FlashAttention, sliding window"
        actions["theirs"] = lambda: flash_attn_func(*values[:3], causal=True, window_size=(WINDOW - 1, 0))
    except ImportError as error:
        yield f"flash-attn cannot be imported ({error}): measured against SDPA, full causal, instead, without a goal"
        label, heads_first = "SDPA, full causal", [rows_attention.heads_first(value) for value in values[:3]]
        attention = torch.nn.functional.scaled_dot_product_attention
        actions["theirs"] = lambda: attention(*heads_first, is_causal=True)
    seconds = context.alternate(actions)
    goal = context.goal("cuda attention") if label.startswith("Flash") else None
    yield figure("memory attention", label, ATTENTION_TOKENS, *both_of(seconds), goal=goal, dtype=DTYPE)


@torch.inference_mode()
def decode_figures(context: Context) -> Iterator[Figure | str]:
    models = {side: load(side, context.models.path(side)).to("cuda", torch.bfloat16) for side in SIDES}
    load.cache_clear()
    memory = BMojoCache(models["ours"].config)
    ids = random_ids(models["ours"].config.vocab_size, DECODE_TOKENS, DECODE_ROWS).cuda()
    for chunk in ids.split(READ_CHUNK, dim=1):
        models["ours"](chunk, **{CACHE_NAME: memory}, logits_to_keep=1)
    options = dict(rows=DECODE_ROWS, device="cuda", dtype=torch.bfloat16)
    caches = {"ours": memory, "theirs": filled_cache(models["theirs"].config, DECODE_TOKENS, **options)}
    actions = {side: steps(models[side], caches[side], rows=DECODE_ROWS) for side in SIDES}
    seconds = per_token(context.alternate(actions, Rounds(least=5, most=15, budget=60)))
    goal = context.goal("cuda decode")
    yield figure("one decoding step, batch 16", "source", DECODE_TOKENS, *both_of(seconds), goal=goal, dtype=DTYPE)


def train_models(**sizes: int) -> dict[str, torch.nn.Module]:
    """Return ours and the Llama of the same backbone, whose weights ours takes over."""
    backbone = {**BACKBONE, **sizes}
    with torch.device("cuda"):
        theirs = LlamaForCausalLM(LlamaConfig(**backbone))
        ours = BMojoForCausalLM(BMojoConfig(**backbone))
    ours.load_state_dict(theirs.state_dict(), strict=False)
    return {"ours": ours.to(torch.bfloat16), "theirs": theirs.to(torch.bfloat16)}


@torch.inference_mode()
def train_checks(context: Context) -> list[Check]:
    """Two layers, fp32, within the window: the same logits."""
    models = {side: model.float().eval() for side, model in train_models(num_hidden_layers=2).items()}
    ids = random_ids(BACKBONE["vocab_size"], 256).cuda()
    largest = difference(*(models[side](ids).logits for side in SIDES))
    return [Check("logits of 256 tokens, 2 layers, fp32, against Llama", largest, 1e-3)]


def train_figures(context: Context) -> Iterator[Figure | str]:
    models = train_models()
    actions = {side: step(models[side], TRAIN_TOKENS, DTYPE) for side in SIDES}
    try:
        seconds = context.alternate(actions, Rounds(least=5, most=10, budget=60))
    finally:
        optimizer_of.cache_clear()
    parameters = [sum(parameter.numel() for parameter in models[side].parameters()) / 1e9 for side in SIDES]
    note = "{:.2f} billion parameters, Llama {:.2f}".format(*parameters)
    goal = context.goal("cuda train")
    yield figure("training step", "Llama", TRAIN_TOKENS, *both_of(seconds), goal=goal, note=note, dtype=DTYPE)


SCAN_TITLE = "SSM chunk scan and convolution, bf16, against calling mamba-ssm and causal-conv1d directly"
ROWS = [
    Row("cuda-scan", SCAN_TITLE, scan_checks, scan_figures, "cuda"),
    Row("cuda-attention", "memory attention, W=512, M=64, bf16", attention_checks, attention_figures, "cuda"),
    Row("cuda-decode", "one token at 128K, batch 16, SmolLM2-135M, bf16", model_checks, decode_figures, "cuda"),
    Row("cuda-train", "a training step of 1.4 billion parameters at 8K, bf16", train_checks, train_figures, "cuda"),
]
