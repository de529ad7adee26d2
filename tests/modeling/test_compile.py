"""torch.compile: one graph, no breaks, no recompilation per token, the same results.

`aot_eager` traces forward and backward as every compiler does and runs the traced operations as they are, so what is
tested is that the model can be traced; what a code generator makes of it is the benchmark's business.
"""

import copy

import pytest
import torch
import torch._dynamo

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM
from tests.tiny import MIXED_LAYERS, SIZES, VOCAB


pytestmark = pytest.mark.own_settings


ONE = dict(num_hidden_layers=1)  # what is traced of more layers, "mixed-layers" and the prompt show
SETTINGS = {
    "output": ONE,
    "state-decay": dict(ONE, innovation="state", eidetic_decay=0.05),
    "key": dict(ONE, innovation="key"),
    "no-projections": dict(ONE, ssm_projected=False),
    "stride": dict(ONE, window_size=6, fading_stride=3),
    "answers": dict(ONE, innovation="key", fading_delay=0),
    "learnt": dict(ONE, innovation="key", innovation_gradient=3.0),
    "learnt-output": dict(ONE, innovation_gradient=3.0),
    "mixed-layers": MIXED_LAYERS,
}
# The first token is traced with the numbers it finds, the second finds them changed and is traced with symbols.
TRACES = 2


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


def build(name, **fields):
    torch.manual_seed(0)
    return BMojoForCausalLM(BMojoConfig(**{**SIZES, **SETTINGS[name], **fields}))


def compiled(model):
    """Breaks in the graph are errors: fullgraph."""
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# Every setting once and the largest both ways; by regions all run again in test_regions.py.
STEPS = [("output", False), ("state-decay", True), ("key", False), ("no-projections", True), ("stride", False)]
STEPS += [("mixed-layers", False), ("mixed-layers", True)]


@pytest.mark.parametrize(("name", "masked"), STEPS)
@torch.no_grad()
def test_a_decoding_step_compiles_once(name, masked):
    """Step by step as eager, logits and every state, with a mask that grows as generate() makes it."""
    model = build(name).double().eval()
    ids = torch.randint(0, VOCAB, (2, 30))
    prompt = torch.ones(2, 14, dtype=torch.int64)
    prompt[0, :3] = 0
    cache = model(ids[:, :14], attention_mask=prompt if masked else None).past_key_values
    reference, step = copy.deepcopy(cache), compiled(model)
    for t in range(14, 30):
        torch._dynamo.config.error_on_recompile = t >= 14 + TRACES
        mask = torch.nn.functional.pad(prompt, (0, t + 1 - 14), value=1) if masked else None
        found = step(ids[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits
        wanted = model(ids[:, t : t + 1], attention_mask=mask, past_key_values=reference).logits
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert graphs() <= TRACES
    assert cache.get_seq_length() == reference.get_seq_length() == 30
    for layer, other in zip(cache.layers, reference.layers, strict=True):
        for state, value in other.states().items():
            torch.testing.assert_close(layer.states()[state], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_training_compiles_once(name):
    model = build(name).double().train()
    step = compiled(model)
    for index in range(3):
        torch._dynamo.config.error_on_recompile = index > 0
        ids = torch.randint(0, VOCAB, (2, 37))
        losses, gradients = [], []
        for form in (model, step):
            model.zero_grad()
            loss = form(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.detach())
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
        for found, wanted in zip(gradients[1], gradients[0], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert graphs() == 1


@torch.no_grad()
def test_a_prompt_compiles_with_its_cache():
    model = build("output", num_hidden_layers=2).double().eval()
    ids = torch.randint(0, VOCAB, (2, 23))
    cache, reference = BMojoCache(model.config), BMojoCache(model.config)
    found = compiled(model)(ids, past_key_values=cache).logits
    torch.testing.assert_close(found, model(ids, past_key_values=reference).logits, rtol=1e-12, atol=1e-12)
    assert graphs() == 1
