"""Models that two processes share by their plans compute what one process computes, in float64.

A tensor plan splits the maps and gives each process half of the heads, of attention, memories, cache and SSM; both keep
the same tokens bit for bit. A pipeline gives each process some of the layers, under transformers (reading, generating)
and under torch.distributed.pipelining (training).
"""

import copy
import functools
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM, BMojoForTokenClassification, BMojoModel
from modeling_bmojo.configuration_bmojo import INNOVATIONS
from modeling_bmojo.fading_bmojo import FadingMemory
from modeling_bmojo.layer_memory_bmojo import LayerMemory
from modeling_bmojo.share_bmojo import Cut, Share, together
from modeling_bmojo.weights_bmojo import weights_fingerprint
from tests.launched.parallel_launched import DTYPE, prompt, read, take_back, train
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, UNPROJECTED


ROOT = Path(__file__).resolve().parents[2]
EVERY_BIAS = dict(attention_bias=True, attention_output_bias=True, mlp_bias=True, ssm_proj_bias=True)
STORED = dict(storage_size=2, storage_candidates=4, storage_sketch_size=2, fading_mass=True, fading_stride=5)
SETTINGS = {
    "tied": dict(tie_word_embeddings=True, ssm_type="mamba"),
    "mixed": dict(
        MIXED_LAYERS,
        **EVERY_BIAS,
        innovation="state",
        tie_fading_projections=False,
        qk_norm="head",
        embedding_multiplier=3.0,
    ),
    "storage": dict(STORED, **UNPROJECTED, innovation="key", qk_norm="full", max_rope_distance=9),
    "delta": dict(ssm_type="gated_delta", innovation="state", eidetic_decay=0.1, decay_clock="innovation"),
    "kalma": dict(ssm_type="kalmanet", innovation="state", qk_norm="head"),
    "queries": dict(
        ssm_head_pattern="multi_query",
        ssm_qk_norm=True,
        tie_fading_projections=False,
        tie_fading_queries=False,
        qk_norm="full",
    ),
    "one group": dict(ssm_num_groups=1, innovation="key", qk_norm="full", storage_size=2, storage_decay=0.1)
    | dict(fading_delay=0),
    "learnt": dict(innovation="key", innovation_gradient=3.0),
    "learnt output": dict(innovation_gradient=3.0),
}
SAVED, WHOLE, PIPED = ("tied", "mixed"), ("tied", "learnt"), ("tied", "mixed", "storage")
# States of which a process has the part of its heads, and the axis of their heads.
OF_HEADS = dict.fromkeys(("keys", "values", "stored_keys", "stored_values", "sketches", "ssm", "key_sum"), 1)
OF_HEADS |= {"mean_keys": 1, "mean_values": 1, "delay_keys": 2, "delay_values": 2}
EXACT = dict(rtol=0, atol=1e-10)
# Whole on every device; whatever else has weights is split.
REPLICATED = re.compile(r"norm\.weight|\.conv\.|\.scalars\.|\.sketch\.")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[str, Path]:
    """Folders of the models, by setting; the two processes start once, go through all and write into them."""
    folders = {name: tmp_path_factory.mktemp("parallel") / name for name in SETTINGS}
    for name, folder in folders.items():
        torch.manual_seed(0)
        randomize_(BMojoForCausalLM(BMojoConfig(**{**SIZES, **SETTINGS[name]})).double()).save_pretrained(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "launched" / "parallel_launched.py"), *map(",".join, (SAVED, WHOLE, PIPED))]
    command += map(str, folders.values())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "TP rules" not in run.stderr and "will not be applied" not in run.stderr  # rules that name no module
    return folders


@functools.cache
def alone(folder: Path) -> dict:
    """What one process computes."""
    model = BMojoForCausalLM.from_pretrained(folder, **DTYPE).eval()
    return {"fingerprint": weights_fingerprint(model), "taken_back": take_back(model)} | read(model) | train(model)


def written(folder: Path, kind: str) -> list[dict]:
    """What each of the two processes wrote."""
    return [torch.load(folder / f"{kind}-{rank}.pt") for rank in (0, 1)]


def assert_same_reading(found: dict, expected: dict) -> None:
    torch.testing.assert_close(found["logits"], expected["logits"], **EXACT)
    torch.testing.assert_close(found["chunks"], expected["chunks"], **EXACT)
    assert torch.equal(found["generated"], expected["generated"]) and torch.equal(found["beams"], expected["beams"])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_split_over_two_processes_is_the_whole_one(name, shared):
    expected = alone(shared[name])
    for found in written(shared[name], "tensor"):
        assert_same_reading(found, expected)
        assert_same_training(found, expected)
        torch.testing.assert_close(found["taken_back"], expected["taken_back"], **EXACT)
        assert found["fingerprint"] == expected["fingerprint"]


def assert_same_training(found: dict, expected: dict) -> None:
    torch.testing.assert_close(found["loss"], expected["loss"], **EXACT)
    assert found["gradients"].keys() == expected["gradients"].keys()
    torch.testing.assert_close(found["gradients"], expected["gradients"], **EXACT)
    assert max(float(each.abs().max()) for each in found["gradients"].values()) > 1e-2


@pytest.mark.parametrize("name", SETTINGS)
def test_each_process_keeps_its_heads_of_the_same_tokens(name, shared):
    """Half the bytes of whatever has heads; the rest of the states is the same in both, bit for bit."""
    first, second = written(shared[name], "tensor")
    assert torch.equal(first["logits"], second["logits"])
    config = BMojoConfig.from_pretrained(shared[name])
    for ours, theirs, expected in zip(first["states"], second["states"], alone(shared[name])["states"]):
        assert ours.keys() == theirs.keys() == expected.keys()
        for state, value in expected.items():
            mine, other = ours[state], theirs[state]
            if state in OF_HEADS:
                assert mine.nbytes == other.nbytes == value.nbytes // 2, state
                mine = torch.cat([mine, other], dim=OF_HEADS[state])
            elif state == "conv":  # of one group for all heads both have B and C
                shared_by_both = 2 * config.ssm_state_size if config.ssm_num_groups == 1 else 0
                shared_by_both = 0 if config.ssm_type == "mamba" else shared_by_both
                assert mine.shape[2] == other.shape[2] == (value.shape[2] + shared_by_both) // 2
                continue  # its order: `test_one_process_goes_on_from_a_cache_of_two`
            else:
                assert torch.equal(mine, other), state
            torch.testing.assert_close(mine.double(), value.double(), **EXACT)


@pytest.mark.parametrize("name", WHOLE)
def test_a_plan_that_leaves_every_process_all_heads_is_the_whole_model_too(name, shared):
    expected = alone(shared[name])
    for found in written(shared[name], "whole"):
        assert_same_reading(found, expected)
        assert_same_training(found, expected)
        for ours, theirs in zip(found["states"], expected["states"]):
            assert {state: value.shape for state, value in ours.items()} == {s: v.shape for s, v in theirs.items()}


# By layer: gathered are the outputs of in_proj (and of an SSM without out_proj), summed those of o_proj, down_proj,
# out_proj, and what docs/compatibility.md names beside them. The embedding and the head are told of once.
TOLD = {
    "tied": {"gather": 2, "reduce": 2 * (3 + 1)},  # x_proj
    "mixed": {"gather": 2, "reduce": 3 + 1 + 2 + 2 + 2},  # the error; two layers without, one of them without o_proj
    "storage": {"gather": 2, "reduce": 2 + 1 + 2 + 1},  # the error, q_norm, k_norm, no SSM; a layer without attention
    "delta": {"gather": 2, "reduce": 2 * (3 + 1)},  # the error
    "kalma": {"gather": 2, "reduce": 2 * (3 + 1)},  # the error
    "queries": {"gather": 2, "reduce": 2 * (3 + 4)},  # norms of q and k, twice
    "learnt": {"gather": 2, "reduce": 2 * (3 + 1)},  # the error
    "learnt output": {"gather": 2, "reduce": 2 * 3},
    "one group": {"gather": 2, "reduce": 2 * (3 + 1 + 1 + 3)},  # the error; norms of the group, of q, of k twice
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_processes_tell_each_other_for_a_token(name, shared):
    found = [each["told"] for each in written(shared[name], "tensor")]
    assert found[0] == found[1]
    kinds = [kind for kind, _ in found[0]]
    assert {"gather": kinds.count("gather") - 1, "reduce": kinds.count("reduce") - 1} == TOLD[name]


@pytest.mark.parametrize("name", SETTINGS)
def test_one_process_goes_on_from_a_cache_of_two(name, shared):
    model, ids = BMojoForCausalLM.from_pretrained(shared[name], **DTYPE).eval(), prompt()
    with torch.no_grad():
        expected = model(torch.cat([ids, ids[:, :3]], dim=1)).logits[:, -3:]
        for rank in (0, 1):
            cache = BMojoCache.load(shared[name] / f"cache-{rank}.pt", model.config)
            torch.testing.assert_close(model(ids[:, :3], past_key_values=cache).logits, expected, **EXACT)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_cache_of_all_heads_is_cut_and_put_together(name):
    config, n = BMojoConfig(**{**SIZES, **SETTINGS[name]}), 2
    model = BMojoModel(config).double().eval()
    with torch.no_grad():
        cache = model(prompt(), use_cache=True).past_key_values
    for index, layer in enumerate(cache.layers):
        whole, parts = layer.states(), []
        for rank in range(n):
            part = copy.deepcopy(layer)
            memory = LayerMemory(config, index, Share(None, rank, n))
            part.prepare(torch.zeros(2, 1, config.hidden_size).double(), memory)
            parts.append(part)
            for state, value in part.states().items():
                declared = memory.declared.get(state)
                if declared is not None and declared.grows is None:
                    assert value.shape[1:] == declared.shape, state
        for state, (axis, slices) in parts[0].memory.cuts.items():
            joined = together([getattr(part, state) for part in parts], slices, axis)
            assert torch.equal(joined, whole[state]), state


@pytest.mark.parametrize("name", SETTINGS)
def test_every_map_is_split_and_the_rest_is_whole(name, shared):
    found = [each["shared"] for each in written(shared[name], "tensor")]
    model = BMojoForCausalLM.from_pretrained(shared[name])
    for key, value in model.named_parameters():
        assert (key in found[0]) == (REPLICATED.search(key) is None), key
        if key in found[0]:  # the bias behind columns that are split is added once, and whole
            whole = key.endswith(("o_proj.bias", "out_proj.bias", "down_proj.bias"))
            held = sum(torch.Size(each[key]).numel() for each in found)
            assert held == value.numel() * (2 if whole else 1), key


@pytest.mark.parametrize("name", SAVED)
def test_what_two_processes_save_is_what_they_loaded(name, shared):
    folder, saved = shared[name], shared[name] / "saved"
    files = {file.name for file in folder.iterdir() if file.is_file() and file.suffix != ".pt"}
    assert {file.name for file in saved.iterdir()} == files and len(files) > 40
    for file in files - {"model.safetensors"}:
        assert (saved / file).read_bytes() == (folder / file).read_bytes(), file
    ours, theirs = (load_file(each / "model.safetensors") for each in (saved, folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", PIPED)
def test_a_pipeline_of_two_processes_is_the_whole_model(name, shared):
    """Tied embeddings are at both ends, and their gradient is the sum of both."""
    expected = alone(shared[name])
    found = written(shared[name], "pipeline")
    for each in found:
        assert_same_reading(each, expected)
    model = BMojoForCausalLM.from_pretrained(shared[name], **DTYPE).train()
    whole = train(model, [prompt()])
    torch.testing.assert_close(torch.stack(found[1]["losses"]).mean(), whole["loss"], **EXACT)
    gradients = [each["gradients"] for each in found]
    both = {"model.embed_tokens.weight"} if model.config.tie_word_embeddings else set()
    assert gradients[0].keys() & gradients[1].keys() == both
    assert gradients[0].keys() | gradients[1].keys() == whole["gradients"].keys()
    for key, value in whole["gradients"].items():
        torch.testing.assert_close(sum(each[key] for each in gradients if key in each), value, **EXACT)


@pytest.mark.parametrize("name", PIPED)
def test_a_stage_holds_the_states_of_its_layers_alone(name, shared):
    stages = [each["states"] for each in written(shared[name], "pipeline")]
    for index, expected in enumerate(alone(shared[name])["states"]):
        here, there = stages if index < len(stages[0]) // 2 else reversed(stages)
        assert there[index].keys() - {"last_hidden"} == {"seen"}
        assert here[index].keys() == expected.keys()
        for state, value in expected.items():
            torch.testing.assert_close(here[index][state], value, rtol=1e-10, atol=1e-10)


# What a pipeline's stage refuses -------------------------------------------------------------------------------------
def a_stage(**fields) -> BMojoModel:
    """As transformers leaves a model to the second of two stages."""
    model = BMojoModel(BMojoConfig(**{**SIZES, **fields})).eval()
    model.layers[0] = PipelineIdentityLayer()
    return model


def test_a_stage_refuses_what_needs_all_layers(tmp_path):
    model = a_stage()
    cache = BMojoCache(model.config)
    with torch.no_grad():
        model(inputs_embeds=torch.randn(1, 12, SIZES["hidden_size"]), past_key_values=cache)
    assert cache.remembered(1) and cache.get_seq_length() == 12
    with pytest.raises(ValueError, match="layer_idx=0: another stage of the pipeline"):
        cache.remembered(0)
    with pytest.raises(ValueError, match=r"other stages of the pipeline have the states of layers \[0\]"):
        cache.save(tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())
    cache.reset()
    assert cache.layers[0].states() == {} and cache.get_seq_length() == 0


def test_arguments_that_a_pipeline_hands_on_as_one_are_looked_at():
    model, ids = BMojoModel(BMojoConfig(**SIZES)).eval(), prompt()
    with torch.no_grad():
        found = model(ids, kwargs={"tokenizer": object(), "head_mask": None}).last_hidden_state
        assert torch.equal(found, model(ids).last_hidden_state)
        with pytest.raises(ValueError, match="head_mask=1: B'MOJO does not know"):
            model(ids, kwargs={"head_mask": 1})
        with pytest.raises(ValueError, match="kwargs=1: B'MOJO does not know"):
            model(ids, kwargs=1)


# Plans ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", [BMojoModel, BMojoForCausalLM, BMojoForTokenClassification])
@pytest.mark.parametrize("fields", [{}, dict(intermediate_size=0, layer_types=["linear_attention"] * 2), UNPROJECTED])
def test_plans_name_what_there_is(cls, fields):
    model = cls(BMojoConfig(**{**SIZES, **fields}))
    modules = dict(model.named_modules())
    assert model.supports_tp_plan and model.supports_pp_plan
    for rule in model.tp_plan.keys() - {"layers.*", "model.layers.*"}:
        assert any(isinstance(modules[key], nn.Linear | nn.Embedding) for key in modules if matches(rule, key)), rule
    for rule in model.pp_plan:
        assert rule in modules
    mapped = {key for key, module in modules.items() if isinstance(module, nn.Linear) and not key.endswith("score")}
    assert all(any(matches(rule, key) for rule in model.tp_plan) for key in mapped)
    assert cls.whole_heads_plan(model.config).keys() < model.tp_plan.keys()


def matches(rule: str, name: str) -> bool:
    return re.fullmatch(rule.replace(".", r"\.").replace("*", r"\d+"), name) is not None


def test_maps_that_give_other_heads_than_the_layer_knows_of_are_refused():
    model, ids = BMojoModel(BMojoConfig(**SIZES)).eval(), prompt()
    attention = model.layers[1].self_attn
    for name in ("q_proj", "k_proj"):
        whole, hidden = getattr(attention, name), SIZES["hidden_size"]
        setattr(attention, name, nn.Linear(hidden, whole.out_features // 2, bias=False))  # what "colwise" leaves here
        with torch.no_grad(), pytest.raises(ValueError, match=r"layer 1: q_proj .* knows of 4 and 2 here"):
            model(ids)
        setattr(attention, name, whole)


# Shares --------------------------------------------------------------------------------------------------------------
def test_the_parts_of_all_devices_are_the_whole():
    value = torch.randn(3, 12, requires_grad=True)
    for count, size in ((4, 2), (6, 3), (2, 4)):
        heads, shares = 12 // max(count, size), [Share(None, rank, size) for rank in range(size)]
        slices = [[share.part(12)] for share in shares]
        with torch.no_grad():
            parts = [Cut(share, own)(value, 1) for share, own in zip(shares, slices)]
        assert torch.equal(together(parts, slices, 1), value) and heads
        groups = [share.groups(count) for share in shares]
        for rank, own in enumerate(groups):  # of every head here
            here = {head * count // 12 for head in range(12)[shares[rank].part(12)]}
            assert set(range(count)[own]) == here


@pytest.mark.parametrize(
    "fields, size, match",
    [
        ({}, 4, "num_key_value_heads=2: must be a multiple of tp_size=4.*whole_heads_plan"),
        (
            dict(num_attention_heads=8, num_key_value_heads=8, head_dim=2, ssm_num_heads=3, ssm_num_groups=1),
            8,
            "ssm_num_h",
        ),
        (
            dict(num_attention_heads=6, num_key_value_heads=6, ssm_num_heads=6, head_dim=4, ssm_num_groups=3),
            2,
            "groups=3",
        ),
        (
            dict(ssm_type="gated_delta", ssm_head_pattern="multi_query", ssm_expand_rank=2),
            2,
            "ssm_expand_rank=2: must be None.*whole_heads_plan",
        ),
    ],
)
def test_heads_that_cannot_be_shared_out_are_refused(fields, size, match):
    model = BMojoModel(BMojoConfig(**{**SIZES, **fields}))
    with pytest.raises(ValueError, match=match):
        model.layers[0].accept_share(Share(None, 0, size))


def test_a_fading_memory_that_knows_no_shares_is_refused():
    layer = BMojoModel(BMojoConfig(**SIZES)).layers[0]
    layer.fading.accept_share = functools.partial(FadingMemory.accept_share, layer.fading)
    with pytest.raises(ValueError, match=r"ssm_type='mamba2': its heads cannot be shared out.*whole_heads_plan"):
        layer.accept_share(Share(None, 0, 2))


def test_a_test_of_ones_own_that_does_not_add_up_is_refused(monkeypatch):
    config = BMojoConfig(**SIZES, innovation="key")
    monkeypatch.setattr(INNOVATIONS["key"], "adds_up", False)
    with pytest.raises(ValueError, match="innovation='key': judges by the key of one device's heads"):
        LayerMemory(config, 0, Share(None, 0, 2))


def test_a_cache_of_some_heads_goes_nowhere_else(tmp_path):
    config = BMojoConfig(**SIZES, storage_size=2)
    model, hidden = BMojoModel(config).eval(), torch.zeros(2, 1, SIZES["hidden_size"])
    memory = LayerMemory(config, 0, Share(None, 1, 2))
    cache = BMojoCache(config)
    for layer in cache.layers:
        layer.prepare(hidden, memory)
    assert copy.deepcopy(cache).layers[0].memory is memory
    with torch.no_grad(), pytest.raises(ValueError, match="layer 0 of the cache holds the heads of device 1 of 2"):
        model(prompt(), past_key_values=cache)
    with pytest.raises(ValueError, match="the heads of device 1 of 2: are not pickled"):
        pickle.dumps(cache)
    cache.reset()
    with torch.no_grad():
        assert model(prompt(), past_key_values=cache).past_key_values is cache  # empty, it is anybody's
    with pytest.raises(ValueError, match="layer 0 of the cache holds all heads"):
        BMojoCache(config, storage=tmp_path / "storage").layers[0].prepare(hidden, memory)


# device_map ----------------------------------------------------------------------------------------------------------
def test_layers_on_disk_are_the_same_model(tmp_path):
    """accelerate fetches the weights of each module when it is called, and takes them away again."""
    torch.manual_seed(0)
    model = randomize_(BMojoForCausalLM(BMojoConfig(**{**SIZES, **SETTINGS["storage"]})).double()).eval()
    model.save_pretrained(tmp_path / "model")
    places = {"model.layers.0": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {f"model.layers.{index}": "disk" for index in range(1, len(model.model.layers))}
    places |= {"model.embed_tokens": "cpu", "lm_head": "disk"}
    options = {"device_map": places, "offload_folder": tmp_path / "disk"}
    mapped = BMojoForCausalLM.from_pretrained(tmp_path / "model", **DTYPE, **options).eval()
    assert {key for key, value in mapped.named_parameters() if value.is_meta} >= {"model.layers.1.mlp.up_proj.weight"}
    model = BMojoForCausalLM.from_pretrained(tmp_path / "model", **DTYPE).eval()
    assert_same_reading(read(mapped), read(model))
