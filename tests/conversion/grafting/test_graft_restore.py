"""conversion.restore: a graft gives its source back byte for byte, or says why it cannot."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.grafting.report import REPORT_FILE, read_report
from conversion.restore import main
from modeling_bmojo import BMojoForCausalLM
from tests.conversion.graft_sources import SOURCES, edit_json, graft, logits, randomised, save_source, tiny_tokenizer


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype
        and torch.equal(tensor.contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
        for name, tensor in one.items()
    )


def restored(tmp_path: Path, *arguments: str) -> int:
    return main([str(tmp_path / "graft"), "--output", str(tmp_path / "copy"), *arguments])


@pytest.mark.parametrize("name", SOURCES)
def test_the_source_comes_back_byte_for_byte(name, tmp_path):
    source = save_source(tmp_path / "source", name)
    assert graft(tmp_path, check=False) == 0
    assert restored(tmp_path) == 0
    assert same_bytes(tensors_of(tmp_path / "copy"), tensors_of(tmp_path / "source"))
    stated, given = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("source", "copy"))
    assert given == stated
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert type(again) is type(source)
    assert torch.equal(logits(again), logits(source))


def test_shards_dtypes_tokenizer_and_generation_settings_come_back(tmp_path, capsys):
    randomised(SOURCES["phi3"]).bfloat16().save_pretrained(tmp_path / "source", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    stated = {"eos_token_id": [3, 2], "temperature": 0.7}
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(stated))
    assert graft(tmp_path, max_shard_size="30KB") == 0
    assert restored(tmp_path, "--max-shard-size", "15KB") == 0
    assert "byte for byte" in capsys.readouterr().out
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 2
    assert same_bytes(tensors_of(tmp_path / "copy"), tensors_of(tmp_path / "source"))
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text()) == stated
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").get_vocab() == tiny_tokenizer().get_vocab()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "copy").dtype == torch.bfloat16
    left = {path.suffix for path in (tmp_path / "copy").iterdir()}
    assert left <= {".json", ".safetensors", ".jinja"}, "no code and no card of the graft"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_to_float32_is_taken_back(dtype, tmp_path):
    randomised(SOURCES["qwen2"]).to(dtype).save_pretrained(tmp_path / "source")
    assert graft(tmp_path, dtype="float32") == 0
    assert restored(tmp_path) == 0
    assert same_bytes(tensors_of(tmp_path / "copy"), tensors_of(tmp_path / "source"))


@pytest.mark.parametrize(
    ("dtype", "cast"),
    [("float32", "bfloat16"), ("float32", "float16"), ("float16", "bfloat16"), ("bfloat16", "float16")],
)
def test_rounded_values_cannot_come_back(dtype, cast, tmp_path, capsys):
    randomised(SOURCES["llama"]).to(getattr(torch, dtype)).save_pretrained(tmp_path / "source")
    assert graft(tmp_path, dtype=cast) == 0
    assert restored(tmp_path) == 2
    message = capsys.readouterr().err
    assert f"rounded it from {dtype} to {cast}" in message and "dtype=null" in message
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.v_proj.weight"])
def test_a_trained_graft_is_no_source(name, tmp_path, capsys):
    save_source(tmp_path / "source", "phi3")
    assert graft(tmp_path) == 0
    path = tmp_path / "graft" / "model.safetensors"
    tensors = load_file(path)
    tensors[name][3, 4] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    assert restored(tmp_path) == 2
    assert name in capsys.readouterr().err
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path, {"format": "pt"})
    assert restored(tmp_path) == 2
    assert name in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graft", "settings.yaml", "source"]


def test_trained_memories_do_not_matter(tmp_path):
    save_source(tmp_path / "source")
    assert graft(tmp_path) == 0
    model = BMojoForCausalLM.from_pretrained(tmp_path / "graft")
    with torch.no_grad():
        for parameter in model.model.layers[0].fading.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "graft")  # the report stays
    assert restored(tmp_path) == 0
    assert same_bytes(tensors_of(tmp_path / "copy"), tensors_of(tmp_path / "source"))


def test_what_is_not_written_is_named(tmp_path, capsys):
    source = save_source(tmp_path / "source", "llama_biases_tied")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    assert graft(tmp_path) == 0
    assert restored(tmp_path) == 0
    assert "lm_head.weight" in capsys.readouterr().out
    assert same_bytes(tensors_of(tmp_path / "copy"), tensors)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "copy")), logits(source))


def test_folders_that_cannot_be_used_are_refused(tmp_path, capsys):
    save_source(tmp_path / "source")
    assert graft(tmp_path) == 0
    assert restored(tmp_path, "--max-shard-size", "big") == 2
    assert "max_shard_size='big'" in capsys.readouterr().err
    assert main([str(tmp_path / "source"), "--output", str(tmp_path / "copy")]) == 2
    assert REPORT_FILE in capsys.readouterr().err
    assert main([str(tmp_path / "graft"), "--output", str(tmp_path / "graft")]) == 2
    assert "holds the source" in capsys.readouterr().err
    assert main([str(tmp_path / "graft"), "--output", str(tmp_path / "source")]) == 2
    assert "not empty" in capsys.readouterr().err
    report = read_report(tmp_path / "graft")
    edit_json(tmp_path / "graft" / REPORT_FILE, source={"label": report["source"]["label"]})  # of an earlier version
    assert restored(tmp_path) == 2
    assert "graft the source again" in capsys.readouterr().err


def test_a_failure_leaves_nothing(tmp_path, monkeypatch, capsys):
    save_source(tmp_path / "source")
    assert graft(tmp_path) == 0

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("conversion.restore.joined", fail)
    assert restored(tmp_path) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graft", "settings.yaml", "source"]
