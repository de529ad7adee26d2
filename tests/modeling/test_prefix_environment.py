"""A prefix memory that the environment names: `generate()` goes on from it, and keeps nothing unless asked to."""

import os

import pytest
import torch

from modeling_bmojo import BMojoCache
from tests.modeling.test_prefix import build, tokens


GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BMOJO_PREFIX_MEMORY", str(tmp_path / "prefixes"))
    return tmp_path / "prefixes"


@pytest.fixture
def read():
    """The columns of each forward of the first layer of a model, in the order they came."""

    def record(model):
        lengths = []
        model.model.layers[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
        return lengths

    return record


def kept(folder):
    return sorted(name.rpartition("-")[0] for name in os.listdir(folder) if name.startswith("prefix-"))


def test_a_known_beginning_is_gone_on_from_and_nothing_is_kept(folder, read):
    model, ids = build(), tokens(60, rows=1)
    plain = model.generate(ids, use_cache=False, **GREEDY)
    model.prefix_memory(folder).read(ids[:, :50])
    before, lengths = sorted(os.listdir(folder)), read(model)
    assert torch.equal(model.generate(ids, **GREEDY), plain)
    assert lengths == [10] + [1] * 7 and sorted(os.listdir(folder)) == before


def test_prompts_are_kept_when_asked_for(folder, read, monkeypatch):
    monkeypatch.setenv("BMOJO_PREFIX_KEEP", "20")
    monkeypatch.setenv("BMOJO_PREFIX_MAX_BYTES", "10000000")
    model, ids = build(), tokens(60, rows=1)
    other = torch.cat([ids[:, :45], tokens(9, rows=1, seed=5)], dim=1)
    plain = [model.generate(each, use_cache=False, **GREEDY) for each in (ids, other)]
    lengths = read(model)
    assert torch.equal(model.generate(ids, **GREEDY), plain[0])
    assert lengths == [20, 20, 19, 1] + [1] * 7 and kept(folder) == ["prefix-20", "prefix-40", "prefix-59"]
    lengths.clear()
    assert torch.equal(model.generate(other, **GREEDY), plain[1])  # parts from the first behind 45 tokens
    assert lengths == [13, 1] + [1] * 7
    lengths.clear()
    said = torch.cat([plain[0], tokens(5, rows=1, seed=7)], dim=1)  # a next turn
    assert torch.equal(model.generate(said, **GREEDY), model.generate(said, use_cache=False, **GREEDY))
    assert lengths[0] == 1 and lengths[1] == 12  # 60, and from there to 72 of 73


def test_files_stay_below_the_bytes(folder, monkeypatch):
    model = build()
    one = model.prefix_memory(folder)
    one.read(tokens(30, rows=1))
    monkeypatch.setenv("BMOJO_PREFIX_KEEP", "1000")
    monkeypatch.setenv("BMOJO_PREFIX_MAX_BYTES", str(3 * one.nbytes))
    for seed in range(6):
        model.generate(tokens(20, rows=1, seed=seed), **GREEDY)
    assert 0 < one.nbytes <= 3 * one.nbytes and len(one.lengths) == 3


def test_beams_and_drafts_go_on_from_it(folder, monkeypatch):
    model, ids = build(), tokens(60, rows=1)
    options = [dict(num_beams=3), dict(prompt_lookup_num_tokens=3), dict(assistant_model=build())]
    monkeypatch.delenv("BMOJO_PREFIX_MEMORY")
    plain = [model.generate(ids, **GREEDY, **each) for each in options]
    monkeypatch.setenv("BMOJO_PREFIX_MEMORY", str(folder))
    model.prefix_memory(folder).read(ids[:, :50])
    for each, expected in zip(options, plain):
        assert torch.equal(model.generate(ids, **GREEDY, **each), expected)


def test_calls_that_no_prefix_memory_takes_are_as_without(folder, monkeypatch):
    model, ids = build(), tokens(30, rows=2)
    model.generation_config.pad_token_id = 0
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    padded = ids[1:] * mask[1:]
    calls = [
        dict(inputs=ids),
        dict(inputs=ids, attention_mask=mask),
        dict(inputs=padded, attention_mask=mask[1:]),
        dict(inputs=padded),
        dict(inputs=ids[:1], use_cache=False),
        dict(inputs=ids[:1, :1]),
        dict(inputs_embeds=model.get_input_embeddings()(ids[:1])),
    ]
    monkeypatch.setenv("BMOJO_PREFIX_KEEP", "5")
    monkeypatch.setenv("BMOJO_PREFIX_MAX_BYTES", "10000000")
    found = [model.generate(**each, **GREEDY) for each in calls]
    found.append(model.generate(ids[:1], past_key_values=BMojoCache(model.config), **GREEDY))
    model.train()
    found.append(model.generate(ids[:1], **GREEDY))
    model.eval()
    assert not folder.exists()
    for name in ("BMOJO_PREFIX_MEMORY", "BMOJO_PREFIX_KEEP", "BMOJO_PREFIX_MAX_BYTES"):
        monkeypatch.delenv(name)
    expected = [model.generate(**each, **GREEDY) for each in calls] + [model.generate(ids[:1], **GREEDY)] * 2
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# Bad input -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "²"])
@pytest.mark.parametrize("name", ["BMOJO_PREFIX_KEEP", "BMOJO_PREFIX_MAX_BYTES"])
def test_numbers_that_are_none_are_refused(name, value, folder, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"{name}='.*': must be a number of (tokens|bytes) >= 1"):
        build().generate(tokens(9, rows=1), **GREEDY)
    assert not folder.exists()


def test_keeping_without_a_bound_and_numbers_without_a_folder_are_refused(folder, monkeypatch):
    monkeypatch.setenv("BMOJO_PREFIX_KEEP", "5")
    with pytest.raises(ValueError, match=r"BMOJO_PREFIX_KEEP=5: .* set BMOJO_PREFIX_MAX_BYTES"):
        build().generate(tokens(9, rows=1), **GREEDY)
    monkeypatch.setenv("BMOJO_PREFIX_MEMORY", "")
    with pytest.raises(ValueError, match="name its folder in BMOJO_PREFIX_MEMORY"):
        build().generate(tokens(9, rows=1), **GREEDY)
    assert not folder.exists()


def test_another_models_folder_is_refused(folder):
    build().prefix_memory(folder).read(tokens(20, rows=1))
    other = build()
    other.model.layers[0].mlp.up_proj.weight.data += 1
    with pytest.raises(ValueError, match="was read with other weights, or another adapter"):
        other.generate(tokens(30, rows=1), **GREEDY)
