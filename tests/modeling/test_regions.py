"""compile_regions: one program per kind of layer, no program per token, the same results.

The backend runs what was traced as it is: that a traced model differentiates and keeps its states through a compiler is
tested in test_compile.py, what a code generator makes of it is the benchmark's business.
"""

import copy
import pickle

import pytest
import torch
import torch._dynamo

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM, cache_of, full_context_bmojo
from modeling_bmojo.share_bmojo import Share
from tests.tiny import MIXED_LAYERS, SIZES, VOCAB


pytestmark = pytest.mark.own_settings

THREE = dict(num_hidden_layers=3)
SETTINGS = {
    "output": THREE,
    "state-decay": dict(THREE, innovation="state", eidetic_decay=0.05),
    "key-clock": dict(THREE, innovation="key", eidetic_decay=0.05, decay_clock="innovation"),
    "far": dict(THREE, window_size=6, fading_stride=3, max_rope_distance=9),
    "mamba": dict(THREE, ssm_type="mamba"),
    "gated_delta": dict(THREE, ssm_type="gated_delta"),
    "kalmanet": dict(THREE, ssm_type="kalmanet"),
    "mixed-layers": MIXED_LAYERS,
}
PROMPT, LENGTH = 14, 34


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


def build(name="output", **fields):
    torch.manual_seed(0)
    return BMojoForCausalLM(BMojoConfig(**{**SIZES, **SETTINGS[name], **fields})).double().eval()


def programs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(model):
    """A copy that runs compiled; breaks in a program are errors."""
    model = copy.deepcopy(model)
    model.compile_regions(backend="eager", fullgraph=True)
    return model


def same_states(cache, other):
    assert cache.get_seq_length() == other.get_seq_length()
    for layer, wanted in zip(cache.layers, other.layers, strict=True):
        assert (layer.columns, layer.even) == (wanted.columns, wanted.even)
        assert layer.states().keys() == wanted.states().keys()
        for name, value in wanted.states().items():
            torch.testing.assert_close(layer.states()[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(("name", "fixed"), [*((name, False) for name in SETTINGS), ("mixed-layers", True)])
@torch.no_grad()
def test_every_layer_of_a_kind_runs_one_program(name, fixed, monkeypatch):
    """Logits and states of every token; full attention, whose buffers grow, is compiled once more for any size."""
    monkeypatch.setattr(full_context_bmojo, "GROWTH", 4)
    model = build(name)
    kinds = set(model.config.layer_types)
    ids = torch.randint(0, VOCAB, (2, LENGTH))
    wanted = cache_of(model(ids[:, :PROMPT]))
    cache, fast = copy.deepcopy(wanted), compiled(model)
    if fixed:
        room = LENGTH if "full_attention" in kinds else None
        cache.fix(fast, room=room), wanted.fix(model, room=room)
    for t in range(PROMPT, LENGTH):
        torch._dynamo.config.error_on_recompile = t > PROMPT + 10
        found = fast(ids[:, t : t + 1], past_key_values=cache).logits
        torch.testing.assert_close(
            found, model(ids[:, t : t + 1], past_key_values=wanted).logits, rtol=1e-12, atol=1e-12
        )
    assert len(kinds) <= programs() <= len(kinds) + ("full_attention" in kinds and not fixed)
    same_states(cache, wanted)


@pytest.mark.parametrize(("name", "options"), [("output", {}), ("mixed-layers", dict(num_beams=2))])
def test_generate_of_a_padded_batch(name, options):
    model = build(name)
    ids, mask = torch.randint(1, VOCAB, (2, PROMPT)), torch.ones(2, PROMPT, dtype=torch.int64)
    mask[0, :5] = 0
    given = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0, **options)
    found = compiled(model).generate(ids, **given)
    assert programs() > 0
    assert torch.equal(found, model.generate(ids, **given))


@torch.no_grad()
def test_the_first_token_and_a_pad_between():
    """A cache that has read nothing, and a step in which one row has a pad."""
    model = build()
    ids = torch.randint(0, VOCAB, (2, 20))
    cache, wanted, fast = BMojoCache(model.config), BMojoCache(model.config), compiled(model)
    for t in range(20):
        mask = torch.tensor([[1], [int(t % 7 != 3)]])
        mask = None if t < 3 else mask
        pair = [
            form(ids[:, t : t + 1], attention_mask=mask, past_key_values=states).logits
            for form, states in ((fast, cache), (model, wanted))
        ]
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)
    same_states(cache, wanted)


@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_the_plain_step():
    model = build()
    ids = torch.randint(0, VOCAB, (1, PROMPT + 3))
    asked, fast = dict(output_hidden_states=True), compiled(model)
    wanted = cache_of(model(ids[:, :PROMPT]))
    cache = copy.deepcopy(wanted)
    for t, more in enumerate(({}, asked, dict(asked, output_attentions=True)), PROMPT):
        pair = [
            form(ids[:, t : t + 1], past_key_values=states, **more) for form, states in ((fast, cache), (model, wanted))
        ]
        for field in ("hidden_states", "attentions"):
            found, plain = (list(getattr(out, field) or ()) for out in pair)
            assert len(plain) == len(found) and (t > PROMPT or not plain)
            torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    assert programs() == 1


def test_gradients_and_prompts_run_as_they_did():
    model, ids = build(), torch.randint(0, VOCAB, (1, PROMPT + 1))
    fast = compiled(model)
    with torch.no_grad():
        cache = cache_of(fast(ids[:, :PROMPT]))
    fast(ids[:, PROMPT:], past_key_values=cache).logits.sum().backward()
    assert programs() == 0


def test_a_cache_read_under_inference_mode_goes_on_without():
    model, ids = build(), torch.randint(0, VOCAB, (1, PROMPT + 2))
    fast = compiled(model)
    with torch.inference_mode():
        cache = cache_of(fast(ids[:, :PROMPT]))
        fast(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)
    with torch.no_grad():
        found = fast(ids[:, PROMPT + 1 :], past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids).logits[:, -1:], rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_a_step_that_fails_leaves_the_count():
    model, ids = build(), torch.randint(0, VOCAB, (1, PROMPT + 1))
    cache = cache_of(model(ids[:, :PROMPT]))
    fast = compiled(model)
    fast.model.layers[0].mlp.forward = None
    with pytest.raises(Exception, match="NoneType"):
        fast(ids[:, PROMPT:], past_key_values=cache)
    assert [layer.columns for layer in cache.layers] == [PROMPT] * 3


@torch.no_grad()
def test_a_copy_has_programs_of_its_own():
    model, ids = build(), torch.randint(0, VOCAB, (1, PROMPT + 1))
    fast = compiled(model)
    for form in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        before, cache = programs(), cache_of(model(ids[:, :PROMPT]))
        found = form(ids[:, PROMPT:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids).logits[:, -1:], rtol=1e-11, atol=1e-11)
        assert programs() == before + 1


@torch.no_grad()
def test_one_narrow_row_is_written_out_and_hooks_are_heard():
    """Products and the head's in fp32 equal the plain ones; a map with a hook is called, and gives what that says."""
    model, ids = build().float(), torch.randint(0, VOCAB, (1, PROMPT + 1))
    cache = cache_of(model(ids[:, :PROMPT]))
    plain = model(ids[:, PROMPT:], past_key_values=copy.deepcopy(cache)).logits
    torch.testing.assert_close(compiled(model)(ids[:, PROMPT:], past_key_values=copy.deepcopy(cache)).logits, plain)
    assert programs() == 2
    fast = compiled(model)
    fast(ids[:, PROMPT:], past_key_values=copy.deepcopy(cache))
    for hooked in ("model.layers.1.mlp.down_proj", "model.layers.0.mlp", "lm_head"):
        for form in (fast, model):  # after the programs were made
            form.get_submodule(hooked).register_forward_hook(lambda module, arguments, output: output + 1)
        heard = model(ids[:, PROMPT:], past_key_values=copy.deepcopy(cache)).logits
        for form in (fast, compiled(model)):
            found = form(ids[:, PROMPT:], past_key_values=copy.deepcopy(cache)).logits
            torch.testing.assert_close(found, heard)
        assert (heard - plain).abs().max() > 0.1


def test_a_storage_is_refused():
    with pytest.raises(ValueError, match=r"storage_size=4.*storage_size=0"):
        build(storage_size=4).compile_regions()


def test_shared_heads_are_refused():
    model = build()
    for layer in model.model.layers:
        layer.accept_share(Share(None, 0, 2))
    with pytest.raises(ValueError, match=r"compile_regions: 3 layers have a share.*whole_heads_plan"):
        model.compile_regions()
    model.compile_regions(False)
