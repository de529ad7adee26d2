"""Decoding on torch_xla's CPU device: the CPU's logits, and one program for all steps.

A device that compiles whole steps (TPU, Trainium) compiles anew for every new number in one; a fixed cache has none.
`make test-xla` runs this with PJRT_DEVICE=CPU.
"""

import copy

import pytest
import torch
import torch_xla
from torch_xla.debug import metrics

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM, cache_of
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, VOCAB


LENGTH, PROMPT, ROOM, BATCH = 40, 12, 64, 2
SETTINGS = {
    "bmojo": {},
    "mixed": MIXED_LAYERS,
    "far": dict(window_size=6, fading_stride=3, max_rope_distance=9, innovation="key"),
}


def compiled() -> int:
    """Return how many programs were compiled so far."""
    found = metrics.metric_data("CompileTime")
    return 0 if found is None else found[0]


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_decoding_equals_the_cpu(name):
    torch.manual_seed(0)
    model = randomize_(BMojoForCausalLM(BMojoConfig(**{**SIZES, **SETTINGS[name]}))).double().eval()
    ids = torch.randint(1, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    expected, room = model(ids).logits, ROOM if name == "mixed" else None
    device = torch_xla.device()
    there, counts = copy.deepcopy(model).to(device), []
    cache = BMojoCache(model.config).fix(there, BATCH, room=room)
    for at in range(LENGTH):
        logits = there(ids[:, at : at + 1].to(device), cache=cache).logits
        torch_xla.sync()
        torch.testing.assert_close(logits.cpu(), expected[:, at : at + 1], rtol=1e-10, atol=1e-10)
        counts.append(compiled())
    assert counts[-1] == counts[2]  # the first steps find states that were made elsewhere


@torch.no_grad()
def test_a_prompt_read_by_the_cpu():
    """Read there in one forward, continued on the device."""
    torch.manual_seed(0)
    model = randomize_(BMojoForCausalLM(BMojoConfig(**SIZES))).double().eval()
    ids = torch.randint(1, VOCAB, (BATCH, PROMPT), generator=torch.Generator().manual_seed(1))
    wanted = model.generate(ids, max_new_tokens=LENGTH - PROMPT, do_sample=False)
    device = torch_xla.device()
    there = copy.deepcopy(model).to(device)
    out = model(ids)
    cache, text = cache_of(out).fix(model).to(device), torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
    while text.shape[1] < LENGTH:
        logits = there(text[:, -1:].to(device), cache=cache).logits
        torch_xla.sync()  # without it the states wait, and each step is compiled with all those before it
        text = torch.cat([text, logits.argmax(-1).cpu()], dim=1)
    assert torch.equal(text, wanted)
