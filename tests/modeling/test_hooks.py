"""Hooks and adapters inside mixers find every token in the column where the user put it, whatever the pads.

A hook adds something at one token of a projection's output. In a padded or packed batch it must change what it changes
when that row is read alone. The second run of tied k_proj and v_proj, on SSM outputs, is the exception: refused.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM
from modeling_bmojo.linear_bmojo import listeners
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, UNPROJECTED, VOCAB


pytestmark = pytest.mark.own_settings


BASE = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "pad_token_id": 0}
UNTIED = {"tie_fading_projections": False}
SETTINGS = {
    "untied": UNTIED,
    "untied-stride": dict(UNTIED, window_size=6, fading_stride=3, innovation="state"),
    "no-fading": dict(fading_size=0, innovation="key", eidetic_decay=0.05),
    "mixed-layers": {**MIXED_LAYERS, **UNTIED},
    "unprojected": {**UNPROJECTED, **UNTIED},
    "qk-norm": dict(UNTIED, qk_norm="head", norm_position="post"),
    "queries": dict(UNTIED, tie_fading_queries=False, qk_norm="head"),
    "s6": dict(UNTIED, ssm_type="mamba", ssm_state_size=3),
    "delta": dict(UNTIED, ssm_type="gated_delta", ssm_state_size=3),
    "kalma": dict(UNTIED, ssm_type="kalmanet", ssm_state_size=3, ssm_solver_steps=5),
}
PATTERNS = ("left", "right", "inner")
LENGTHS, COLUMNS = [29, 17, 12], 33
ADAPTABLE = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj")
ADAPTABLE += ("fading_q_proj", "fading_k_proj", "fading_v_proj")
INVOCATION = [7, 9]


def build(name="untied", **fields):
    return randomize_(BMojoForCausalLM(BMojoConfig(**{**BASE, **SETTINGS.get(name, {}), **fields}))).double().eval()


def sequences(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, VOCAB, (length,), generator=generator) for length in lengths]


def pad(rows, pattern, columns=COLUMNS):
    """Ids and mask `[B, columns]`, and the columns of each row's tokens; pads hold random ids."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, VOCAB, (len(rows), columns), generator=generator)
    mask, places = torch.zeros_like(ids), []
    for row, real in enumerate(rows):
        first = {"left": columns - len(real), "right": 0}.get(pattern)
        if first is None:
            inner = torch.randperm(columns - 1, generator=generator)[: len(real) - 1].sort().values
            place = torch.cat([inner, torch.tensor([columns - 1])])
        else:
            place = first + torch.arange(len(real))
        ids[row, place], mask[row, place] = real, 1
        places.append(place)
    return ids, mask, places


def projections(model):
    """One of each kind, in the first layer that has it: name in the layer and module."""
    found = {}
    for layer in model.model.layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and "mlp" not in name:
                found.setdefault(name, module)
    return found


def adding(columns):
    """A hook that adds to a module's output at `columns`, one per row."""

    def hook(module, arguments, output):
        changed, rows = output.clone(), torch.arange(len(output))
        changed[rows, columns] = changed[rows, columns] + 3.0
        return changed

    return hook


def logits(model, hooked, hook, **inputs):
    handle = hooked.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model(use_cache=False, **inputs).logits
    finally:
        handle.remove()


def assert_near(actual, expected, what=""):
    assert (actual - expected).abs().max() <= 1e-9 * max(1.0, expected.abs().max().item()), what


# Hooks ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_hook_on_any_projection_changes_the_same_token(name, pattern):
    model, rows = build(name), sequences()
    ids, mask, places = pad(rows, pattern)
    token = torch.tensor([11, 2, 8])  # leaves the window of every row, so that fading tokens and memory show it
    columns = torch.stack([place[index] for place, index in zip(places, token, strict=True)])
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, use_cache=False).logits
    found, kinds = projections(model), {"fading.x_proj", "fading.dt_proj"} if name == "s6" else set()
    assert found.keys() >= {"self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "fading.in_proj"} | kinds
    for where, module in found.items():
        padded = logits(model, module, adding(columns), input_ids=ids, attention_mask=mask)
        assert name == "no-fading" or (padded - plain)[mask == 1].abs().max() > 1e-6, where
        for row, real in enumerate(rows):
            expected = logits(model, module, adding(token[row : row + 1]), input_ids=real[None])
            assert_near(padded[row, places[row]], expected[0], where)


@pytest.mark.parametrize("name", ["untied", "s6"])
def test_the_last_column_is_the_last_token_of_left_padded_rows(name):
    model, rows = build(name), sequences()
    ids, mask, places = pad(rows, "left")
    for where, module in projections(model).items():
        padded = logits(model, module, adding(-1), input_ids=ids, attention_mask=mask)
        for row, real in enumerate(rows):
            assert_near(padded[row, places[row]], logits(model, module, adding(-1), input_ids=real[None])[0], where)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_hook_changes_the_same_token_of_a_packed_batch(name):
    """Of four sequences in two rows, one has the column that the hook looks at."""
    model, rows = build(name), sequences([9, 14, 16, 7])
    ids = torch.cat(rows).view(2, 23)
    positions = torch.cat([torch.arange(len(row)) for row in rows]).view(2, 23)
    for where, module in projections(model).items():
        packed = logits(model, module, adding(torch.tensor([12, 1])), input_ids=ids, position_ids=positions)
        for row, found, token in zip(rows, packed.flatten(0, 1).split([9, 14, 16, 7]), (None, 3, 1, None), strict=True):
            nothing = lambda module, arguments, output: None  # noqa: E731
            hook = nothing if token is None else adding(torch.tensor([token]))
            assert_near(found, logits(model, module, hook, input_ids=row[None])[0], where)


@pytest.mark.parametrize("name", ["untied", "untied-stride", "s6"])
@torch.no_grad()
def test_hooks_in_chunked_prefill_and_decoding(name):
    """Each piece's last column: as the rows read alone in the same pieces."""
    model, rows = build(name), sequences([24, 24, 24])
    ids, mask, places = pad(rows, "left", columns=24 + 8)
    for where, module in projections(model).items():
        handle = module.register_forward_hook(adding(-1))
        cache, found = BMojoCache(model.config), []
        for start, end in zip([0, 18, 28, 29], [18, 28, 29, 32], strict=True):  # the first holds all pads
            found.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        found = torch.cat(found, 1)
        for row, real in enumerate(rows):
            cache = BMojoCache(model.config)
            expected = [model(piece, past_key_values=cache).logits for piece in real[None].split([10, 10, 1, 3], dim=1)]
            assert_near(found[row, places[row]], torch.cat(expected, 1)[0], where)
        handle.remove()


def test_gradients_through_a_hook():
    """Of a padded batch under a hook: what the rows alone sum up to."""
    model, rows = build("untied").train(), sequences()
    ids, mask, places = pad(rows, "left")
    model.model.layers[0].self_attn.v_proj.register_forward_hook(adding(-1))
    weights = [torch.randn(len(row), VOCAB).double() for row in rows]

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)

    out = model(ids, attention_mask=mask).logits
    ours = gradients(sum((out[i, places[i]] * w).sum() for i, w in enumerate(weights)))
    theirs = gradients(sum((model(row[None]).logits[0] * w).sum() for row, w in zip(rows, weights, strict=True)))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert_near(mine, wanted)


# The exception -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
@pytest.mark.parametrize("fields", [{}, {"ssm_type": "mamba"}, {"window_size": 6, "fading_stride": 3}], ids=str)
def test_hooks_on_tied_projections_are_refused_where_columns_differ(projection, fields):
    model, rows = build("tied", **fields), sequences()
    module = getattr(model.model.layers[1].self_attn, projection)
    ids, mask, _ = pad(rows, "left")
    handle = module.register_forward_pre_hook(lambda module, arguments: pytest.fail("ran"))
    with pytest.raises(
        ValueError,
        match=r"layer 1: tests\.modeling\.test_hooks\.<lambda> is hooked onto the tied k_proj or v_proj, which",
    ):
        model(ids, attention_mask=mask)
    handle.remove()
    with pytest.raises(
        ValueError, match=r"layer 1: tests\.modeling\.test_hooks\.hook is hooked onto .*tie_fading_projections=False"
    ):
        logits(model, module, adding(-1), input_ids=ids, attention_mask=mask)
    model(ids, attention_mask=mask)  # without hooks nothing is refused


def test_a_refused_hook_leaves_the_cache_as_it_was():
    """Whichever layer it is in: no layer has read when it is refused."""
    model, (row, *_) = build("tied"), sequences()
    ids, mask = torch.stack([row, row]), torch.ones(2, len(row), dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad():
        memory = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)[1]
        handle = model.model.layers[-1].self_attn.k_proj.register_forward_hook(lambda module, inputs, out: out + 1)
        later = mask.clone()
        later[1, 9] = 0
        with pytest.raises(ValueError, match="hooked onto the tied"):
            model(ids[:, 8:], attention_mask=later, past_key_values=memory)
        handle.remove()
        rest = model(ids[:, 8:], attention_mask=later, past_key_values=memory).logits
        whole = model(ids, attention_mask=later).logits[:, 8:]
    real = later[:, 8:].bool()
    torch.testing.assert_close(rest[real], whole[real], rtol=0, atol=1e-10)


def test_a_hook_on_a_tied_projection_of_one_plain_text_is_taken():
    """Without pads, packing and stride the second run's columns are the input's."""
    model, (row, *_) = build("tied"), sequences()
    seen = []
    module = model.model.layers[0].self_attn.k_proj
    logits(model, module, lambda module, arguments, output: seen.append(output.shape), input_ids=row[None])
    assert seen == [(1, 29, 8)] * 2


def test_what_listens():
    """Whose hooks look at columns: by the package in which they are written, also inside what PEFT has wrapped."""
    module = nn.Sequential(nn.Linear(2, 2))
    assert listeners(module, packed=False) == []
    infrastructure = adding(0)
    infrastructure.__module__ = "torch.distributed.fsdp"
    module[0].register_forward_hook(infrastructure)
    assert listeners(module, packed=False) == []
    by_row = adding(0)
    by_row.__module__, by_row.__name__ = "peft.tuners.lora.model", "_adapter_names_pre_forward_hook"
    module[0].register_forward_pre_hook(by_row)
    assert listeners(module, packed=False) == []
    assert listeners(module, packed=True) == ["peft.tuners.lora.model._adapter_names_pre_forward_hook"]
    near = adding(0)
    near.__module__ = "transformers_modules.mine"
    module[0].register_forward_hook(near)
    assert listeners(module, packed=False) == ["transformers_modules.mine.hook"]


# Adapters that start at a token --------------------------------------------------------------------------------------
def adapted(name, targets=ADAPTABLE, **fields):
    model = build(name, **fields)
    present = {key.rpartition(".")[2] for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = LoraConfig(
        r=2,
        target_modules=[target for target in targets if target in present],
        alora_invocation_tokens=INVOCATION,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    return get_peft_model(model, config).double().eval()


def invoked():
    """Rows in which the adapter starts at different places; in one it never does."""
    rows = sequences()
    rows[0][20:22] = rows[1][3:5] = torch.tensor(INVOCATION)
    return rows


@pytest.mark.parametrize("name", ["untied", "untied-stride", "no-fading", "mixed-layers", "s6"])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_alora_equals_each_row_alone(name, pattern):
    targets = (*ADAPTABLE, "x_proj", "dt_proj", "gate_proj", "up_proj", "down_proj")
    model, rows = adapted(name, targets), invoked()
    ids, mask, places = pad(rows, "left" if pattern == "inner" else pattern)
    if pattern == "inner":  # pads on both sides: the invocation must stand together
        ids, mask = ids.roll(-2, 1), mask.roll(-2, 1)
        places = [(row == 1).nonzero()[:, 0] for row in mask]
    found = model(input_ids=ids, attention_mask=mask).logits
    with model.disable_adapter():
        assert (model(input_ids=ids, attention_mask=mask).logits - found)[mask == 1].abs().max() > 1e-3
    for row, real in enumerate(rows):
        assert_near(found[row, places[row]], model(input_ids=real[None]).logits[0])


@pytest.mark.parametrize("name", ["untied", "s6"])
@torch.no_grad()
def test_alora_generates_as_each_row_alone(name):
    model, rows = adapted(name), invoked()
    ids, mask, _ = pad(rows, "left")
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    found = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, real in enumerate(rows):
        own = model.generate(input_ids=real[None], attention_mask=torch.ones_like(real[None]), **options)
        assert found.sequences[row, ids.shape[1] :].tolist() == own.sequences[0, len(real) :].tolist()
        assert_near(torch.stack(found.logits)[:, row], torch.stack(own.logits)[:, 0])


@torch.no_grad()
def test_alora_on_tied_projections_is_refused():
    model, rows = adapted("tied", ("q_proj", "k_proj")), invoked()
    ids, mask, _ = pad(rows, "left")
    with pytest.raises(ValueError, match=r"peft\.tuners\.lora\.model\._alora_offsets_pre_forward_hook is hooked onto"):
        model(input_ids=ids, attention_mask=mask)
    others, rows = adapted("tied", ("q_proj", "o_proj", "in_proj", "out_proj")), invoked()
    found = others(input_ids=ids, attention_mask=mask).logits
    for row, real in enumerate(rows):
        assert_near(found[row, mask[row] == 1], others(input_ids=real[None]).logits[0])


@torch.no_grad()
def test_mixed_adapters_on_tied_projections():
    """A choice per row stands in the same row of the mixer; packed sequences have rows of their own and are refused."""
    model = build("tied")
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "in_proj"], init_lora_weights=False)
    model = get_peft_model(model, config)
    model.add_adapter("other", config)
    model = model.double().eval()
    ids, mask, places = pad(rows := sequences(), "left")
    names = ["default", "other", "__base__"]
    found = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    for row, real in enumerate(rows):
        expected = model(input_ids=real[None], adapter_names=names[row : row + 1]).logits[0]
        assert_near(found[row, places[row]], expected)
    positions = torch.cat([torch.arange(10), torch.arange(23)])[None].expand(3, -1)
    with pytest.raises(ValueError, match="_adapter_names_pre_forward_hook is hooked onto the tied"):
        model(input_ids=ids, position_ids=positions, adapter_names=names)
