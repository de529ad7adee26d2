"""config.json: anyone can read it, what saves loads, and typos are refused where they are written.

`PreTrainedConfig` is what tools use that do not know a model's class: AutoTokenizer, Trainer when it resumes.
"""

import copy
import json
import math
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Trainer, TrainingArguments
from transformers.configuration_utils import PreTrainedConfig

from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from tests.tiny import MIXED_LAYERS, SIZES


KINDS = MIXED_LAYERS["layer_types"]
LIMITS = [[0.0, math.inf], [0.01, 0.5], [0.25, math.inf]]


def config(**fields) -> BMojoConfig:
    return BMojoConfig(**{**SIZES, "pad_token_id": 0, **fields})


def written(config, folder) -> dict:
    """What stands in config.json, which must be JSON as the standard has it."""
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


# Read by anyone ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("layers", [{}, MIXED_LAYERS, {"layer_types": ["full_attention", "linear_attention"]}])
def test_the_bare_config_reads_it(layers, limit, tmp_path):
    ours = config(**layers, ssm_time_step_limit=limit)
    file = written(ours, tmp_path)
    assert file["layer_kinds"] == ours.layer_types and "layer_types" not in file
    assert file["ssm_time_step_limit"] == [limit[0], None if limit[1] == math.inf else limit[1]]
    for bare in (PreTrainedConfig.from_pretrained(tmp_path), PreTrainedConfig.from_json_file(tmp_path / "config.json")):
        assert type(bare) is PreTrainedConfig and bare.hidden_size == ours.hidden_size
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is BMojoConfig
    assert again.layer_types == again.layer_kinds == ours.layer_types and again.ssm_time_step_limit == limit
    assert written(again, tmp_path / "again") == file


def test_every_way_out_and_in_agrees(tmp_path):
    ours = config(**MIXED_LAYERS, ssm_time_step_limit=[0.25, math.inf])
    fields = ours.to_dict()
    assert fields["layer_types"] == KINDS and fields["ssm_time_step_limit"] == [0.25, math.inf]
    assert ours.to_diff_dict()["layer_types"] == KINDS
    copies = {
        "constructor": BMojoConfig(**fields),
        "from_dict": BMojoConfig.from_dict(fields),
        "difference": BMojoConfig.from_dict(ours.to_diff_dict()),
        "json": BMojoConfig.from_dict(json.loads(ours.to_json_string())),
        "json, all": BMojoConfig(**json.loads(ours.to_json_string(use_diff=False))),
        "copy": copy.copy(ours),
        "deepcopy": copy.deepcopy(ours),
        "pickle": pickle.loads(pickle.dumps(ours)),
    }
    for way, again in copies.items():
        assert again.to_dict() == fields and again.layer_types == KINDS, way
    for way in ("copy", "deepcopy", "pickle"):
        assert copies[way] == ours, way
    assert "layer_kinds" in repr(ours)
    assert GenerationConfig.from_model_config(ours).pad_token_id == 0


@pytest.mark.parametrize("infinity", [{"__float__": "Infinity"}, math.inf, None])
def test_every_form_of_no_limit_is_read(infinity, tmp_path):
    file = written(config(), tmp_path)
    file["ssm_time_step_limit"] = [0.25, infinity]
    (tmp_path / "config.json").write_text(json.dumps(file))  # the second writes a bare Infinity
    assert BMojoConfig.from_pretrained(tmp_path).ssm_time_step_limit == [0.25, math.inf]
    assert BMojoConfig(**file).ssm_time_step_limit == [0.25, math.inf]


def test_the_old_key_is_read_and_two_that_disagree_are_refused(tmp_path):
    file = written(config(**MIXED_LAYERS), tmp_path)
    old = {**file, "layer_types": file["layer_kinds"]}
    assert BMojoConfig(**old).layer_types == KINDS
    old.pop("layer_kinds")
    (tmp_path / "config.json").write_text(json.dumps(old))
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.layer_types == KINDS and "layer_types" not in written(again, tmp_path / "new")
    other = {**file, "layer_types": ["bmojo"] * 4}
    with pytest.raises(ValueError, match=r"layer_kinds=.*: contradicts layer_types=.*; give one of them"):
        BMojoConfig(**other)
    with pytest.raises(ValueError, match=r"layer_types.*must be a list"):
        BMojoConfig(**{**file, "layer_kinds": 4})


def test_overrides_are_heard_under_both_names(tmp_path):
    config(**MIXED_LAYERS).save_pretrained(tmp_path)
    other = ["linear_attention"] * 4
    for given in ({"layer_types": other}, {"layer_kinds": other}):
        again = AutoConfig.from_pretrained(tmp_path, window_size=9, **given)
        assert again.window_size == 9 and again.layer_types == other
        assert written(again, tmp_path / "again")["layer_kinds"] == other


# What saves loads ----------------------------------------------------------------------------------------------------
def test_a_key_of_others_comes_back(tmp_path, caplog):
    """Tools write keys of their own into a config: kept, and named once, because they change nothing."""
    model = BMojoForCausalLM(config())
    model.config.pretraining_tp = 1
    model.config.of_a_tool = {"ratio": [0.5, math.inf], "layer": {"1": "x"}}
    model.save_pretrained(tmp_path)
    for load in (AutoModelForCausalLM, BMojoForCausalLM):
        again = load.from_pretrained(tmp_path).config
        assert again.pretraining_tp == 1 and again.of_a_tool == model.config.of_a_tool
    assert BMojoConfig.from_dict(model.config.to_dict()).pretraining_tp == 1
    assert BMojoConfig.from_json_file(tmp_path / "config.json").pretraining_tp == 1
    again.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").pretraining_tp == 1
    told = [record.message for record in caplog.records if "of_a_tool" in record.message]
    assert len(told) == 1 and "pretraining_tp" in told[0] and "nothing of this package reads them" in told[0]


def test_a_typo_is_refused_where_it_is_written_and_named_where_it_is_read(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"window_sizee=3: .*did you mean 'window_size'"):
        config(window_sizee=3)
    with pytest.raises(ValueError, match=r"window_sizee=3: .*did you mean 'window_size'"):
        AutoConfig.for_model("bmojo", window_sizee=3)
    file = written(config(), tmp_path)
    with pytest.raises(ValueError, match=r"window_sizee=3: .*did you mean 'window_size'"):
        AutoConfig.from_pretrained(tmp_path, window_sizee=3)
    unused = AutoConfig.from_pretrained(tmp_path, window_sizee=3, return_unused_kwargs=True)[1]
    assert unused == {"window_sizee": 3}  # who asks for what is left is told; models then refuse it
    with pytest.raises(TypeError, match="window_sizee"):
        BMojoForCausalLM._from_config(config(), window_sizee=3)
    (tmp_path / "config.json").write_text(json.dumps({**file, "eidetic_sise": 3}))
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.eidetic_sise == 3 and again.eidetic_size == SIZES["eidetic_size"]
    assert "eidetic_sise (did you mean 'eidetic_size'?)" in caplog.text


def test_an_attribute_that_looks_like_a_typo_is_named_before_it_is_used_or_saved(tmp_path, caplog):
    ours = config()
    ours.fading_sizes = 9
    BMojoForCausalLM(ours).save_pretrained(tmp_path)
    assert "fading_sizes (did you mean 'fading_size'?)" in caplog.text
    assert AutoConfig.from_pretrained(tmp_path).fading_sizes == 9


def test_a_config_that_cannot_be_written_leaves_the_file_alone(tmp_path):
    ours = config()
    before = written(ours, tmp_path)
    refused = {
        "window_size": 0,
        "layer_types": None,
        "layer_kinds": ["bmojo"],
        "no_rope_layers": 1,
        "rope_parameters": {"rope_type": "default"},
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
        "ssm_time_step_limit": None,
        "dtype": "floaty",
        "temperature": 0.5,
    }
    for name, value in refused.items():
        broken = copy.deepcopy(ours)
        setattr(broken, name, value)
        with pytest.raises(ValueError, match=name.replace("kinds", "types")):
            broken.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()) == before, name
    ours.of_a_tool = object()
    with pytest.raises(TypeError, match="JSON"):
        ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == before


# Trainer -------------------------------------------------------------------------------------------------------------
def test_training_resumes_bit_for_bit(tmp_path):
    def trainer(name):
        torch.manual_seed(0)
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(1, 61, (8, 20)).tolist()]
        arguments = TrainingArguments(str(tmp_path / name), use_cpu=True, report_to="none", max_steps=3, save_steps=1)
        return Trainer(BMojoForCausalLM(config(**MIXED_LAYERS)), arguments, train_dataset=rows)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert resumed.state.global_step == 3
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
