"""Models that two processes share by their plans compute what one process computes, in float64.

A tensor plan splits the maps; attention, innovation test and SSM run on all heads in both processes, so that both keep
the same tokens bit for bit. A pipeline gives each process some of the layers, under transformers (reading, generating)
and under torch.distributed.pipelining (training).
"""

import functools
import os
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
from modeling_bmojo.weights_bmojo import weights_fingerprint
from tests.launched.parallel_launched import DTYPE, prompt, read, train
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
}
SAVED = ("tied", "mixed")
EXACT = dict(rtol=0, atol=1e-10)
# Whole on every device; whatever else has weights is split.
REPLICATED = re.compile(r"norm\.weight|\.conv\.|\.scalars\.|\.sketch\.|\.x_proj\.|\.dt_proj\.")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[str, Path]:
    """Folders of the models, by setting; the two processes start once, go through all and write into them."""
    folders = {name: tmp_path_factory.mktemp("parallel") / name for name in SETTINGS}
    for name, folder in folders.items():
        torch.manual_seed(0)
        randomize_(BMojoForCausalLM(BMojoConfig(**{**SIZES, **SETTINGS[name]})).double()).save_pretrained(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "launched" / "parallel_launched.py"), ",".join(SAVED), *map(str, folders.values())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "TP rules" not in run.stderr and "will not be applied" not in run.stderr  # rules that name no module
    return folders


@functools.cache
def alone(folder: Path) -> dict:
    """What one process computes."""
    model = BMojoForCausalLM.from_pretrained(folder, **DTYPE).eval()
    return {"fingerprint": weights_fingerprint(model)} | read(model) | train(model)


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
        torch.testing.assert_close(found["loss"], expected["loss"], **EXACT)
        assert found["gradients"].keys() == expected["gradients"].keys()
        torch.testing.assert_close(found["gradients"], expected["gradients"], **EXACT)
        assert max(float(each.abs().max()) for each in found["gradients"].values()) > 1e-2
        assert found["fingerprint"] == expected["fingerprint"]


@pytest.mark.parametrize("name", SETTINGS)
def test_both_processes_keep_the_same_bit_for_bit(name, shared):
    first, second = written(shared[name], "tensor")
    assert torch.equal(first["logits"], second["logits"])
    for ours, theirs, expected in zip(first["states"], second["states"], alone(shared[name])["states"]):
        assert ours.keys() == theirs.keys() == expected.keys()
        for state, value in ours.items():
            assert torch.equal(value, theirs[state]), state
            torch.testing.assert_close(value.double(), expected[state].double(), **EXACT)


@pytest.mark.parametrize("name", SETTINGS)
def test_one_process_goes_on_from_a_cache_of_two(name, shared):
    model, ids = BMojoForCausalLM.from_pretrained(shared[name], **DTYPE).eval(), prompt()
    with torch.no_grad():
        expected = model(torch.cat([ids, ids[:, :3]], dim=1)).logits[:, -3:]
        for rank in (0, 1):
            cache = BMojoCache.load(shared[name] / f"cache-{rank}.pt", model.config)
            torch.testing.assert_close(model(ids[:, :3], past_key_values=cache).logits, expected, **EXACT)


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


@pytest.mark.parametrize("name", SETTINGS)
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


@pytest.mark.parametrize("name", SETTINGS)
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
    for rule in model.tp_plan:
        assert any(isinstance(modules[key], nn.Linear | nn.Embedding) for key in modules if matches(rule, key)), rule
    for rule in model.pp_plan:
        assert rule in modules
    mapped = {key for key, module in modules.items() if isinstance(module, nn.Linear) and not key.endswith("score")}
    assert all(any(matches(rule, key) for rule in model.tp_plan) for key in mapped)


def matches(rule: str, name: str) -> bool:
    return re.fullmatch(rule.replace(".", r"\.").replace("*", r"\d+"), name) is not None


def test_a_plan_that_gives_each_device_some_heads_is_refused():
    model, ids = BMojoModel(BMojoConfig(**SIZES)).eval(), prompt()
    attention = model.layers[1].self_attn
    for name in ("q_proj", "k_proj"):
        whole, hidden = getattr(attention, name), SIZES["hidden_size"]
        setattr(attention, name, nn.Linear(hidden, whole.out_features // 2, bias=False))  # what "colwise" leaves here
        with torch.no_grad(), pytest.raises(ValueError, match=r"layer 1: q_proj .* every device needs all"):
            model(ids)
        setattr(attention, name, whole)


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
