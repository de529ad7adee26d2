"""RoPE tables: transformers' fp32 inverse frequencies, times the position exactly."""

import copy
import math
from decimal import Decimal, localcontext

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from modeling_bmojo.modeling_bmojo import BMojoRotaryEmbedding
from tests.tiny import SIZES


PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
POSITIONS = [0, 1, 1000, 4_194_303, 9_999_999, 10_000_000]
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "large theta": {"rope_type": "default", "rope_theta": 5e6},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def config(rope, **fields):
    return BMojoConfig(
        **{**SIZES, "hidden_size": 128, "max_position_embeddings": 512, "rope_parameters": rope, **fields}
    )


def exact(frequency, position):
    """cos and sin of the product of the two numbers as they are stored, worked out with 60 digits."""
    with localcontext() as context:
        context.prec = 60
        angle = float((Decimal(frequency) * position) % (2 * PI))
    return math.cos(angle), math.sin(angle)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_at_far_positions(name, dtype):
    rope = BMojoRotaryEmbedding(config(ROPES[name]))
    cos, sin = rope(torch.zeros(1, dtype=dtype), torch.tensor([POSITIONS]))
    assert cos.dtype == sin.dtype == dtype and cos.shape == (1, len(POSITIONS), 1, 32)
    for channel, frequency in enumerate(rope.inv_freq.tolist()):
        for index, position in enumerate(POSITIONS):
            wanted = exact(frequency, position)
            for half in (0, 16):
                assert cos[0, index, 0, half + channel].item() == pytest.approx(wanted[0], abs=1e-6)
            assert sin[0, index, 0, channel].item() == pytest.approx(-wanted[1], abs=1e-6)
            assert sin[0, index, 0, 16 + channel].item() == pytest.approx(wanted[1], abs=1e-6)


@pytest.mark.parametrize("name", ROPES)
def test_inverse_frequencies_are_transformers_own(name):
    ours = BMojoRotaryEmbedding(config(ROPES[name]))
    sizes = dict(hidden_size=128, num_attention_heads=4, max_position_embeddings=512)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=ROPES[name]))
    assert ours.inv_freq.dtype == torch.float32 and torch.equal(ours.inv_freq, theirs.inv_freq)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_keeps_its_inverse_frequencies(cast):
    """Rounded to 8 bits, a frequency would turn a token at position 1000 by some other angle."""
    model = BMojoForCausalLM(config(ROPES["default"]))
    before = copy.deepcopy(dict(model.model.rotary_emb.named_buffers()))
    model.to(cast)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == cast
    for name, value in model.model.rotary_emb.named_buffers():
        assert torch.equal(value.to(torch.float64), before[name].to(torch.float64)), name
    cos, _ = model.model.rotary_emb(torch.zeros(1), torch.tensor([[10_000_000]]))
    assert cos[0, 0, 0, 1].item() == pytest.approx(exact(before["inv_freq"][1].item(), 10_000_000)[0], abs=1e-6)
