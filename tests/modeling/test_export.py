"""torch.export, and transformers' exporters upon it: prompts, and steps and chunks that go on from a cache.

A program is for one number of new tokens; how many were read before it does not matter to it.
"""

import copy
import logging

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers.exporters.configs import DynamoConfig
from transformers.exporters.exporter_dynamo import DynamoExporter

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM, cache_axes, cache_of
from modeling_bmojo.compat_bmojo import CACHE_NAME
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, VOCAB


# A saved program holds its sample inputs, and torch 2.13 warns of every class that is not its own by a broken message.
logging.getLogger("torch._export.serde.serialize").setLevel(logging.ERROR)

SETTINGS = {"bmojo": {}, "mixed": MIXED_LAYERS, "s6": dict(ssm_type="mamba", innovation="key")}
SETTINGS["delta"] = dict(ssm_type="gated_delta", innovation="state")
SETTINGS["kalma"] = dict(ssm_type="kalmanet", innovation="state", ssm_solver_steps=3)


def build(name="bmojo"):
    return randomize_(BMojoForCausalLM(BMojoConfig(**{**SIZES, **SETTINGS[name]}))).double().eval()


def tokens(length, batch=2, seed=0):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def export(model, **inputs):
    """Return the program of a forward with these inputs; a cache may have read any number of columns."""
    shapes = {name: cache_axes(value) if isinstance(value, BMojoCache) else None for name, value in inputs.items()}
    return torch.export.export(model, (), copy.deepcopy(inputs), dynamic_shapes=shapes)


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def assert_same_memory(model, cache, other):
    """The same tokens and states, though entries may stand in other places; and eager code reads on alike."""
    assert type(cache) is BMojoCache and cache.get_seq_length() == other.get_seq_length()
    for layer, wanted in zip(cache.layers, other.layers, strict=True):
        found = layer.states()
        for name, expected in wanted.states().items():
            if name in ("positions", "seen"):
                assert torch.equal(found[name].sort().values, expected.sort().values)
            elif name in ("ssm", "conv", "last_hidden"):
                assert_near(found[name], expected)
    more = tokens(5, seed=2)
    assert_near(model(more, cache=cache).logits, model(more, cache=other).logits)


@pytest.mark.parametrize("name, masked", [("bmojo", True), ("mixed", False)])
def test_a_prompt(name, masked):
    model, ids = build(name), tokens(13)
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    program = export(model, input_ids=ids, **mask).module()
    other = tokens(13, seed=1)
    if masked:
        mask["attention_mask"][0, :3] = 0
    found, expected = program(input_ids=other, **mask), model(other, **mask)
    assert_near(found.logits, expected.logits)
    assert_same_memory(model, cache_of(found), cache_of(expected))


@pytest.mark.parametrize("name, columns", [("bmojo", 8), ("mixed", 1), ("s6", 1), ("delta", 7), ("kalma", 7)])
def test_one_program_reads_on_after_any_number_of_columns(name, columns, tmp_path):
    """From a file, as it is deployed; the second call is the first with another length than was traced."""
    model, ids = build(name), tokens(70)
    cache = cache_of(model(ids[:, :13]))
    torch.export.save(export(model, input_ids=ids[:, 13 : 13 + columns], **{CACHE_NAME: cache}), tmp_path / "step.pt2")
    program, reference = torch.export.load(tmp_path / "step.pt2").module(), copy.deepcopy(cache)
    for start in range(13, 70 - columns + 1, columns):
        part = ids[:, start : start + columns]
        found, expected = program(input_ids=part, **{CACHE_NAME: cache}), model(part, cache=reference)
        cache = cache_of(found)
        assert_near(found.logits, expected.logits)
    assert_same_memory(model, cache, reference)


def test_padded_chunks():
    model, ids = build(), tokens(64)
    mask = (torch.arange(64) % 5 > torch.tensor([[0], [-1]])).long()
    cache = cache_of(model(ids[:, :8], attention_mask=mask[:, :8]))
    inputs = {"input_ids": ids[:, 8:16], "attention_mask": mask[:, 8:16], CACHE_NAME: cache}
    program = export(model, **inputs).module()
    for start in range(8, 64, 8):
        part = slice(start, start + 8)
        out = program(input_ids=ids[:, part], attention_mask=mask[:, part], **{CACHE_NAME: cache})
        cache = cache_of(out)
    expected = model(ids, attention_mask=mask)
    assert_near(out.logits, expected.logits[:, -8:])
    cache.check_mask(mask)  # the fingerprint of the pads went through the programs
    with pytest.raises(ValueError, match="attention_mask"):
        cache.check_mask(mask.flip(0))


def test_transformers_takes_generation_apart():
    model, ids = build("mixed"), tokens(13)
    parts = DynamoExporter().export_for_generation(model, {"input_ids": ids}, DynamoConfig())
    # transformers 5.20 returns the programs by name, later versions an object that has them.
    run = getattr(parts, "runners", None) or {name: program.module() for name, program in parts.items()}
    expected = model.generate(ids, max_new_tokens=2, do_sample=False)
    out = run["prefill"](input_ids=ids, **{CACHE_NAME: BMojoCache(model.config)})
    first = out.logits[:, -1:].argmax(-1)
    out = run["decode"](input_ids=first, **{CACHE_NAME: cache_of(out)})
    assert torch.equal(torch.cat([ids, first, out.logits[:, -1:].argmax(-1)], 1), expected)


def test_a_cache_as_a_tree():
    model, ids = build("mixed"), tokens(31)
    for cache in (BMojoCache(model.config), cache_of(model(ids[:, :13]))):
        leaves, tree = pytree.tree_flatten(cache)
        again = pytree.tree_unflatten([leaf.clone() for leaf in leaves], tree)
        assert pytree.treespec_loads(pytree.treespec_dumps(tree)) == tree
        assert_near(model(ids[:, 13:], cache=again).logits, model(ids[:, 13:], cache=copy.deepcopy(cache)).logits)


def test_what_is_no_tree():
    model, ids = build(), tokens(13)
    taken_back = BMojoCache(model.config, rollback_limit=3)
    model(ids, cache=taken_back)
    with pytest.raises(ValueError, match=r"rollback_limit=3: .*cannot be exported"):
        pytree.tree_flatten(taken_back)
    half = cache_of(model(ids))
    half.layers[0].unfinished = True
    with pytest.raises(ValueError, match="stopped halfway"):
        pytree.tree_flatten(half)
