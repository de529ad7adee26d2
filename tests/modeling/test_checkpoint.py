"""Checkpoints and configurations: what is saved is what is loaded, and what is damaged or contradictory is refused.

The graft's own export is in test_graft.py; here a user saves and loads a model with nothing but transformers' calls.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import modeling_bmojo
from modeling_bmojo import BMojoConfig, BMojoForCausalLM, BMojoModel
from tests.oracles import randomize_
from tests.strangers import run_stranger
from tests.tiny import MIXED_LAYERS, SIZES, UNPROJECTED, VOCAB


BASE = {**SIZES, "pad_token_id": 0}
MODELS = {
    "plain": {},
    "tied": dict(tie_word_embeddings=True),
    "every tensor there is": dict(
        **MIXED_LAYERS,
        no_rope_layers=[1, 1, 0, 1],
        tie_fading_projections=False,
        attention_bias=True,
        mlp_bias=True,
        qk_norm="head",
        ssm_proj_bias=True,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
        | {"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "bare": dict(intermediate_size=0, rope_parameters=None, ssm_gated=False, ssm_norm=False, ssm_conv_bias=False)
    | dict(tie_word_embeddings=True, innovation="state", eidetic_decay=0.5, ssm_time_step_limit=[0.01, 0.5]),
    "unprojected": dict(**UNPROJECTED, ssm_proj_bias=True),
    "s6": dict(ssm_type="mamba", ssm_time_step_rank=3, ssm_proj_bias=True),
    "delta": dict(ssm_type="gated_delta", ssm_proj_bias=True),
    "kalma": dict(ssm_type="kalmanet", ssm_expand_rank=8, ssm_proj_bias=True),
}


def build(name="plain", dtype=torch.float32, cls=BMojoForCausalLM, **fields):
    """A model with random values in every tensor; A_log, dt_bias and D keep fp32 when dtype is lower."""
    model = randomize_(cls(BMojoConfig(**{**BASE, **MODELS[name], **fields}))).eval()
    for parameter_name, parameter in model.named_parameters():
        if ".scalars." not in parameter_name:
            parameter.data = parameter.data.to(dtype)
    model.tie_weights()
    return model


def tokens(length=24, batch=2):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def load(folder, auto=AutoModelForCausalLM, **kwargs):
    """Model and loading report: which keys were missing, unexpected or mismatched."""
    model, info = auto.from_pretrained(folder, output_loading_info=True, **kwargs)
    return model.eval(), {key: set(value) for key, value in info.items()}


def assert_same_tensors(actual, expected, leave_out=()):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if name not in leave_out:
            assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


@torch.no_grad()
def assert_same_logits(actual, expected):
    assert torch.equal(actual(input_ids=tokens()).logits, expected(input_ids=tokens()).logits)


# Save and load -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_comes_back(name, dtype, shard, tmp_path):
    model = build(name, dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if shard == "5GB" else len(files) > 1
    loaded, info = load(tmp_path)
    assert type(loaded) is BMojoForCausalLM and not any(info.values())
    assert_same_tensors(loaded, model)
    assert_same_logits(loaded, model)
    # The premise: every tensor had a value of its own, that no initialisation gives; scalars are fp32 in the file too.
    stored = {key: value for file in files for key, value in load_file(file).items()}
    assert all(value.dtype == (torch.float32 if ".scalars." in key else dtype) for key, value in stored.items())
    assert all(len(value.unique()) > 1 for value in stored.values())
    tied = model.config.tie_word_embeddings
    assert ("lm_head.weight" in stored) is not tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_loading_in_bf16_keeps_the_scalars_in_fp32(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "fp32")
    for dtype in (torch.bfloat16, torch.float16):
        loaded, _ = load(tmp_path / "fp32", dtype=dtype)
        for key, value in loaded.state_dict().items():
            wanted = model.state_dict()[key]
            assert value.dtype == (torch.float32 if ".scalars." in key else dtype), key
            assert torch.equal(value, wanted.to(value.dtype)), key
        loaded.save_pretrained(tmp_path / "again")
        again, _ = load(tmp_path / "again")
        assert_same_tensors(again, loaded)


@pytest.mark.parametrize("name", MODELS)
def test_what_stays_in_fp32_is_there(name):
    """transformers takes a name of that list for a slip where no module has it."""
    model = build(name)
    keys = [key.split(".") for key in model.state_dict()]
    kept = model._keep_in_fp32_modules_strict
    assert all(any(module in key for key in keys) for module in kept)
    assert ("scalars" in kept) is any("scalars" in key for key in keys)
    assert BMojoForCausalLM._keep_in_fp32_modules_strict == ["scalars", "sketch"]


def test_sketches_stay_in_fp32_and_windows_alone_have_nothing_to_keep():
    stored = build(storage_size=4, storage_candidates=8, storage_sketch_size=4)
    assert sorted(stored._keep_in_fp32_modules_strict) == ["scalars", "sketch"]
    windows = build(layer_types=["sliding_attention", "full_attention"])
    assert not windows._keep_in_fp32_modules_strict
    assert build(ssm_scalars_in_fp32=False)._keep_in_fp32_modules_strict == set()


@pytest.mark.parametrize("name", MODELS)
def test_buffers_that_are_not_saved_are_made_anew(name, tmp_path):
    """Loading builds the model without memory first: what a file does not hold must be computed then."""
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    expected = dict(model.named_buffers())
    assert dict(loaded.named_buffers()).keys() == expected.keys()
    assert bool(expected) is (model.config.rope_parameters is not None)
    for key, value in loaded.named_buffers():
        assert torch.equal(value, expected[key]), key


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_sane(name, value, config):
    """What `_init_weights` promises for a tensor of this name."""
    assert torch.isfinite(value).all(), name
    if name.endswith("A_log"):
        assert torch.equal(value, torch.arange(1, value.shape[-1] + 1).log().expand_as(value)), name
    elif name.endswith("dt_bias"):
        step = torch.nn.functional.softplus(value)
        assert (step > config.ssm_time_step_min * 0.99).all() and (step < config.ssm_time_step_max * 1.01).all(), name
    elif name.endswith(".D") or "norm" in name:
        assert (value == 1).all(), name
    elif name.endswith("bias"):
        assert (value == 0).all(), name
    elif name.endswith("dt_proj.weight"):
        bound = config.ssm_time_step_rank**-0.5
        assert 0.8 * bound < value.abs().max() <= bound and value.std() > 0.4 * bound, name
    elif name.endswith("_repeat"):
        assert torch.equal(value, torch.eye(value.shape[1]).repeat_interleave(len(value) // value.shape[1], 0)), name
    elif name.endswith(("keys_up.weight", "values_up.weight")):
        assert (value == 0).all(), name
    elif name.endswith("conv.weight"):
        assert value.abs().max() <= config.ssm_conv_kernel**-0.5 and value.std() > 0.1, name
    else:
        rows = value[1:] if "embed" in name else value  # row 0 belongs to the pad token
        assert rows.std().item() == pytest.approx(config.initializer_range, rel=0.25), name


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_tensor_is_reported_and_leaves_the_others_alone(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    names = load_file(tmp_path / "model.safetensors").keys()
    layers = [key for key in names if ".layers." not in key or key.split(".")[2] in ("0", "3")]
    for missing in layers:
        (tmp_path / "model.safetensors").write_bytes(whole)
        edit_weights(tmp_path, lambda tensors, missing=missing: tensors.pop(missing))
        loaded, info = load(tmp_path)
        assert {missing} <= info["missing_keys"] <= {missing, "lm_head.weight"}
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        tied = model.config.tie_word_embeddings and missing == "model.embed_tokens.weight"
        assert_same_tensors(loaded, model, leave_out={missing, "lm_head.weight"} if tied else {missing})
        assert_sane(missing, loaded.state_dict()[missing], model.config)
        assert torch.isfinite(loaded(input_ids=tokens()).logits).all()


def test_an_unknown_tensor_is_reported(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({"model.layers.0.ghost.weight": torch.ones(2)}))
    loaded, info = load(tmp_path)
    assert info["unexpected_keys"] == {"model.layers.0.ghost.weight"} and not info["missing_keys"]
    assert_same_tensors(loaded, model)


def test_a_checkpoint_from_before_unprojected_memories_loads(tmp_path):
    """Its config.json has no field `ssm_projected`, and its layers have x rows and out_proj."""
    model = build()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("ssm_projected") is True
    path.write_text(json.dumps(fields))
    loaded, info = load(tmp_path)
    assert not any(info.values()) and "model.layers.0.fading.out_proj.weight" in loaded.state_dict()
    assert_same_tensors(loaded, model)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_comes_back(tied, tmp_path):
    model = build(tie_word_embeddings=tied)
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    loaded, info = load(tmp_path)
    assert not any(info.values()) and loaded.config.vocab_size == loaded.lm_head.out_features == 70
    assert_same_tensors(loaded, model)
    assert loaded(input_ids=torch.tensor([[69]])).logits.shape == (1, 1, 70)


def test_generation_settings_come_back(tmp_path):
    model = build()
    model.generation_config.update(eos_token_id=[7, 9], do_sample=True, temperature=0.6, max_new_tokens=5)
    model.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    assert loaded.generation_config.eos_token_id == [7, 9]


# Damaged folders -----------------------------------------------------------------------------------------------------
def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "shard truncated": (lambda folder: truncate(shards(folder)[1]), SafetensorError, "incomplete|not fully covered"),
    "shard empty": (lambda folder: shards(folder)[1].write_bytes(b""), SafetensorError, "header|too small"),
    "shard missing": (lambda folder: shards(folder)[1].unlink(), OSError, r"model-00002-of-\d+\.safetensors"),
    "index damaged": (lambda folder: truncate(folder / "model.safetensors.index.json"), ValueError, r"line \d+"),
    "config damaged": (lambda folder: truncate(folder / "config.json"), OSError, r"config\.json.*not a valid JSON"),
    "config missing": (lambda folder: (folder / "config.json").unlink(), (OSError, ValueError), r"config\.json"),
    "contradictory field": (lambda folder: edit_config(folder, window_size=0), ValueError, "window_size=0: must be"),
    "unknown layer type": (
        lambda folder: edit_config(folder, layer_kinds=["bmojo", "hyena"]),
        ValueError,
        r"layer_types\[1\]='hyena': must be one of",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused(damage, tmp_path):
    break_it, error, message = DAMAGES[damage]
    build().save_pretrained(tmp_path, max_shard_size="8KB")
    load(tmp_path)
    break_it(tmp_path)
    with pytest.raises(error, match=message):
        load(tmp_path)


def test_missing_weights_are_refused(tmp_path):
    build().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.1.fading.in_proj.weight", "model.layers.0.fading.scalars.D"])
def test_a_wrong_shape_is_refused_with_name_and_shapes(name, tmp_path, caplog):
    """The exception points to a report in the log, which names the tensor and both shapes."""
    build().save_pretrained(tmp_path)
    shape = load_file(tmp_path / "model.safetensors")[name].shape
    edit_weights(tmp_path, lambda tensors: tensors.update({name: tensors[name][1:].clone()}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path)
    shorter = torch.Size([shape[0] - 1, *shape[1:]])
    assert name in caplog.text and f"ckpt: {shorter} vs model:{shape}" in caplog.text


# Auto classes and heads ----------------------------------------------------------------------------------------------
def test_auto_classes_know_the_model(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is BMojoConfig and type(AutoConfig.for_model("bmojo", **BASE)) is BMojoConfig
    for auto, wanted in modeling_bmojo.AUTO_CLASSES.items():
        assert type(auto.from_config(config)) is wanted
    base, info = load(tmp_path, AutoModel)
    assert type(base) is BMojoModel and not info["missing_keys"]
    assert_same_tensors(base, model.model)
    base.save_pretrained(tmp_path / "base")
    again, info = load(tmp_path / "base")  # from the bare model: the head is missing, and only the head
    assert info["missing_keys"] == {"lm_head.weight"}
    assert_same_tensors(again.model, base)


HEADS = {
    AutoModelForSequenceClassification: ({"score.weight"}, (3, 5), dict(labels=torch.tensor([0, 4, 2]))),
    AutoModelForTokenClassification: (
        {"score.weight", "score.bias"},
        (3, 24, 5),
        dict(labels=torch.arange(72).view(3, 24) % 5),
    ),
    AutoModelForQuestionAnswering: (
        {"qa_outputs.weight", "qa_outputs.bias"},
        (3, 24),
        dict(start_positions=torch.tensor([0, 3, 23]), end_positions=torch.tensor([1, 9, 23])),
    ),
}


@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
def test_heads(auto, tmp_path):
    """A head on a pretrained model: only the head is new, it runs, it learns, and it comes back."""
    new, shape, labels = HEADS[auto]
    build().save_pretrained(tmp_path)
    model, info = load(tmp_path, auto, **({} if auto is AutoModelForQuestionAnswering else {"num_labels": 5}))
    assert type(model) is modeling_bmojo.AUTO_CLASSES[auto]
    assert info["missing_keys"] == new and info["unexpected_keys"] == {"lm_head.weight"}
    out = model(input_ids=tokens(batch=3), **labels)
    scores = out.start_logits if auto is AutoModelForQuestionAnswering else out.logits
    assert scores.shape == shape and torch.isfinite(out.loss)
    out.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
    randomize_(model, seed=1).save_pretrained(tmp_path / "head")
    again, info = load(tmp_path / "head", auto)
    assert not any(info.values())
    assert_same_tensors(again, model)
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens(batch=3))[0], model(input_ids=tokens(batch=3))[0])


# The exported code ---------------------------------------------------------------------------------------------------
STRANGER = """
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, given, result = sys.argv[1:]
ids = load_file(given)["ids"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    out = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    logits = model(input_ids=ids).logits
out.past_key_values.save(result + ".cache")
model.save_pretrained(folder + "-again")
save_file({"sequences": out.sequences, "logits": logits}, result)
"""


def run_folder(folder, tmp_path):
    """Loads, generates and saves in a process that cannot import the package; returns what it computed."""
    given, result = tmp_path / "given.safetensors", tmp_path / "result.safetensors"
    save_file({"ids": tokens()}, given)
    run_stranger(STRANGER, tmp_path, folder, given, result)
    return load_file(result)


def exported_code(folder):
    """The modules that config.json's auto_map names, and the Python files there are."""
    auto_map = json.loads((folder / "config.json").read_text()).get("auto_map", {})
    named = {f"{name.split('--')[-1].split('.')[0]}.py" for name in auto_map.values()}
    return named, {file.name for file in folder.glob("*.py")}


@pytest.mark.parametrize("name", ["every tensor there is", "s6"])
def test_a_model_travels_with_its_code(name, tmp_path):
    model, folder = build(name), tmp_path / "travels"
    model.save_pretrained(folder)
    named, files = exported_code(folder)
    assert named == {"configuration_bmojo.py", "modeling_bmojo.py"} <= files
    # The package's flat files and nothing else: its rooms stay at home.
    assert files == {file.name for file in Path(modeling_bmojo.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert [entry.name for entry in folder.iterdir() if entry.is_dir()] == []
    result = run_folder(folder, tmp_path)
    with torch.no_grad():
        expected = model.generate(tokens(), max_new_tokens=12, do_sample=False)
        logits = model(input_ids=tokens()).logits
    assert torch.equal(result["sequences"], expected) and torch.equal(result["logits"], logits)
    # What the stranger keeps is ours: its cache goes on here, its copy of the model travels on.
    cache = modeling_bmojo.BMojoCache.load(tmp_path / "result.safetensors.cache", model.config)
    assert cache.get_seq_length() == expected.shape[1] - 1
    again = tmp_path / "travels-again"
    assert exported_code(again) == (named, files)
    loaded, _ = load(again, trust_remote_code=False)
    assert_same_tensors(loaded, model)


@pytest.mark.parametrize("with_code", [True, False])
def test_a_folder_never_names_code_it_does_not_hold(with_code, tmp_path, monkeypatch):
    """A plain save, and a save of a model that came from a folder with code: load it, tune it, save it."""
    with monkeypatch.context() as patch:
        if not with_code:  # transformers' switch
            patch.setattr(BMojoConfig, "_auto_class", None)
            patch.setattr(BMojoForCausalLM, "_auto_class", None)
        build().save_pretrained(tmp_path / "first")
    named, files = exported_code(tmp_path / "first")
    assert named <= files and bool(files) is bool(named) is with_code
    load(tmp_path / "first", trust_remote_code=False)[0].save_pretrained(tmp_path / "second")
    named, files = exported_code(tmp_path / "second")
    assert named <= files


# Configurations ------------------------------------------------------------------------------------------------------
def round_trip(config, folder):
    config.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder)


def plain(config):
    """The fields, without what transformers notes about where a config comes from."""
    return {
        key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "transformers_version")
    }


@pytest.mark.parametrize("name", MODELS)
def test_configurations_come_back_from_json(name, tmp_path):
    config = BMojoConfig(**{**BASE, **MODELS[name]})
    again = round_trip(config, tmp_path)
    assert type(again) is BMojoConfig and plain(again) == plain(config)
    assert [again.layer_spec(i) for i in range(again.num_hidden_layers)] == [
        config.layer_spec(i) for i in range(config.num_hidden_layers)
    ]
    assert plain(BMojoConfig.from_json_file(tmp_path / "config.json")) == plain(config)
    assert plain(BMojoConfig(**config.to_dict())) == plain(config)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)  # no NaN or Infinity: valid JSON


def test_no_positions_stay_no_positions(tmp_path):
    """None is not "the default", neither in the file nor in the model."""
    config = BMojoConfig(**BASE, rope_parameters=None)
    assert config.rope_parameters is None
    again = round_trip(config, tmp_path)
    assert again.rope_parameters is None and BMojoModel(again).rotary_emb is None
    assert BMojoConfig(**BASE).rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_defaults_are_derived():
    config = BMojoConfig(hidden_size=48, num_attention_heads=6, num_hidden_layers=3)
    assert (config.num_key_value_heads, config.head_dim, config.attention_output_bias) == (6, 8, False)
    assert config.layer_types == ["bmojo"] * 3
    assert (config.ssm_num_heads, config.ssm_head_dim, config.ssm_num_groups) == (6, 8, 6)
    grouped = BMojoConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=16, attention_bias=True
    )
    assert (grouped.ssm_num_heads, grouped.ssm_head_dim, grouped.ssm_num_groups) == (6, 16, 2)
    assert grouped.attention_output_bias is True
    assert config.ssm_norm is True and config.ssm_time_step_rank is None
    s6 = BMojoConfig(hidden_size=72, num_attention_heads=6, num_key_value_heads=2, ssm_type="mamba")
    assert (s6.ssm_num_groups, s6.ssm_norm, s6.ssm_time_step_rank) == (1, False, 5)
    delta = BMojoConfig(hidden_size=72, num_attention_heads=6, num_key_value_heads=2, ssm_type="gated_delta")
    assert (delta.ssm_num_groups, delta.ssm_norm, delta.ssm_time_step_rank) == (2, True, None)
    kalma = BMojoConfig(hidden_size=72, num_attention_heads=6, num_key_value_heads=2, ssm_type="kalmanet")
    assert (kalma.ssm_num_groups, kalma.ssm_norm, kalma.ssm_solver_steps, kalma.ssm_ridge) == (2, True, 30, 0.02)


@st.composite
def valid_fields(draw):
    """Fields that agree with each other, far from the defaults."""
    groups, repeat = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ssm_type, ssm_repeat = (
        draw(st.sampled_from(["mamba2", "mamba", "gated_delta", "kalmanet"])),
        draw(st.integers(1, 3)),
    )
    is_mamba2, is_s6 = ssm_type == "mamba2", ssm_type == "mamba"
    ssm_groups = 1 if is_s6 else draw(st.integers(1, 3))
    heads, layers = groups * repeat, draw(st.integers(1, 3))
    even = st.integers(1, 4).map(lambda n: 2 * n)
    rope = st.sampled_from(
        [
            None,
            {},
            {"rope_theta": 500.0},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        ]
    )
    low = draw(st.floats(0, 0.5, allow_subnormal=False))
    high = draw(st.one_of(st.just(math.inf), st.floats(0.6, 5)))
    kinds = st.sampled_from(["bmojo", "full_attention", "sliding_attention", "linear_attention"])
    head_dim = draw(st.sampled_from([None, 4, 8]))
    hidden = heads * draw(even) * 2 if head_dim is None else draw(st.integers(1, 20))
    projected, ssm_head_dim = draw(st.booleans()) or not is_mamba2, draw(st.integers(1, 5))
    if not projected:
        ssm_head_dim = draw(st.sampled_from([size for size in range(1, 6) if hidden % size == 0]))
        ssm_repeat, ssm_groups = hidden // ssm_head_dim, 1
    return dict(
        vocab_size=draw(st.integers(3, 50)),
        hidden_size=hidden,
        intermediate_size=draw(st.integers(0, 9)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        tie_word_embeddings=draw(st.booleans()),
        pad_token_id=draw(st.sampled_from([None, 0, 2])),
        eos_token_id=draw(st.sampled_from([None, 1, [1, 2]])),
        rope_parameters=draw(rope),
        attention_bias=draw(st.booleans()),
        attention_output_bias=draw(st.sampled_from([None, True, False])),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from([None, "head", "full"])),
        norm_position=draw(st.sampled_from(["pre", "post"])),
        embedding_multiplier=draw(st.sampled_from([1.0, 3.5])),
        attention_multiplier=draw(st.sampled_from([None, 0.25])),
        residual_multiplier=draw(st.sampled_from([1.0, 0.5])),
        logits_scaling=draw(st.sampled_from([1.0, 8])),
        no_rope_layers=draw(st.one_of(st.none(), st.lists(st.integers(0, 1), min_size=layers, max_size=layers))),
        layer_types=draw(st.one_of(st.none(), st.lists(kinds, min_size=layers, max_size=layers))),
        window_size=draw(st.integers(1, 9)),
        eidetic_size=draw(st.integers(0, 5)),
        eidetic_decay=draw(st.one_of(st.just(0), st.floats(0, 3, allow_subnormal=False))),
        innovation=draw(st.sampled_from(["output", "state", "key"])),
        innovation_taps=draw(st.integers(1, 6)),
        fading_size=draw(st.integers(0, 12)),
        tie_fading_projections=draw(st.booleans()),
        memory_block_size=draw(st.integers(1, 9)),
        ssm_type=ssm_type,
        ssm_num_heads=ssm_groups * ssm_repeat,
        ssm_head_dim=ssm_head_dim,
        ssm_state_size=draw(st.integers(1, 6)),
        ssm_num_groups=ssm_groups,
        ssm_time_step_rank=draw(st.integers(1, 3)) if is_s6 else None,
        ssm_solver_steps=draw(st.integers(1, 6)),
        ssm_ridge=draw(st.floats(0.001, 1)),
        ssm_expand_rank=draw(st.sampled_from([None, 1, 3])) if ssm_type == "kalmanet" else None,
        ssm_conv_kernel=draw(st.integers(1, 5)),
        ssm_conv_bias=draw(st.booleans()),
        ssm_conv_act=draw(st.sampled_from(["silu", "linear", "gelu"])),
        ssm_projected=projected,
        ssm_proj_bias=draw(st.booleans()),
        ssm_gated=draw(st.booleans()),
        ssm_norm=not is_s6 and draw(st.booleans()),
        ssm_chunk_size=draw(st.integers(1, 9)),
        ssm_time_step_limit=draw(st.sampled_from([list, tuple]))((low, high)),
    )


@settings(max_examples=40)
@given(fields=valid_fields())
def test_any_valid_configuration_comes_back_and_runs(fields, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    config = BMojoConfig(**fields)
    for name, value in fields.items():
        if name not in ("rope_parameters", "layer_types", "attention_output_bias", "head_dim"):
            wanted = list(value) if isinstance(value, tuple) else value
            assert getattr(config, name) == wanted, name
    again = round_trip(config, folder)
    assert plain(again) == plain(config)
    model = BMojoForCausalLM(config).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.randint(0, config.vocab_size, (2, 23))).logits
    assert logits.shape == (2, 23, config.vocab_size) and torch.isfinite(logits).all()
    model.save_pretrained(folder / "model")
    loaded, info = load(folder / "model")
    assert not any(info.values())
    assert_same_tensors(loaded, model)
    shutil.rmtree(folder)


NAN, INF = math.nan, math.inf
CONTRADICTIONS = [
    ("vocab_size", 0),
    ("vocab_size", -1),
    ("vocab_size", "61"),
    ("hidden_size", 0),
    ("hidden_size", 16.0),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", "2"),
    ("num_attention_heads", 0),
    ("num_attention_heads", True),
    ("num_key_value_heads", 0),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", 8),
    ("head_dim", 0),
    ("head_dim", 2.5),
    ("head_dim", 3),  # rotary embeddings turn pairs of channels
    ("intermediate_size", -1),
    ("intermediate_size", None),
    ("hidden_act", "swoosh"),
    ("max_position_embeddings", 0),
    ("initializer_range", -1.0),
    ("rms_norm_eps", -1.0),
    ("rms_norm_eps", NAN),
    ("pad_token_id", VOCAB),
    ("pad_token_id", -1),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
    ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": -1.0}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.5}),
    ("rope_parameters", "default"),
    ("qk_norm", "layer"),
    ("qk_norm", True),
    ("norm_position", "both"),
    ("norm_position", None),
    ("embedding_multiplier", 0),
    ("embedding_multiplier", None),
    ("attention_multiplier", 0.0),
    ("attention_multiplier", "sqrt"),
    ("residual_multiplier", -1.0),
    ("logits_scaling", 0),
    ("logits_scaling", INF),
    ("attention_dropout", 1.0),
    ("attention_dropout", -0.1),
    ("attention_dropout", NAN),
    ("no_rope_layers", [1]),
    ("no_rope_layers", [1, 2]),
    ("no_rope_layers", 1),
    ("layer_types", []),
    ("layer_types", ["bmojo"]),
    ("layer_types", ["bmojo"] * 3),
    ("layer_types", ["bmojo", "hyena"]),
    ("layer_types", [None, "bmojo"]),
    ("window_size", 0),
    ("window_size", -3),
    ("window_size", None),
    ("window_size", True),
    ("window_size", 4.0),
    ("eidetic_size", -1),
    ("eidetic_size", None),
    ("eidetic_size", 1.5),
    ("eidetic_decay", -0.1),
    ("eidetic_decay", NAN),
    ("eidetic_decay", INF),
    ("eidetic_decay", None),
    ("eidetic_decay", "0.1"),
    ("innovation", "input"),
    ("innovation", None),
    ("innovation_taps", 0),
    ("innovation_gradient", -0.1),
    ("innovation_gradient", INF),
    ("innovation_gradient", None),
    ("fading_size", -1),
    ("fading_size", None),
    ("fading_delay", -1),
    ("fading_delay", 2.0),
    ("fading_delay", 1000),
    ("memory_block_size", 0),
    ("ssm_type", "s4"),
    ("ssm_type", None),
    ("ssm_time_step_rank", 1),  # Mamba-2 has none
    ("ssm_expand_rank", 4),  # only KalmaNet has
    ("ssm_solver_steps", 0),
    ("ssm_solver_steps", 2.5),
    ("ssm_ridge", 0),
    ("ssm_ridge", NAN),
    ("ssm_num_heads", 0),
    ("ssm_head_dim", 0),
    ("ssm_state_size", 0),
    ("ssm_num_groups", 0),
    ("ssm_num_groups", 3),
    ("ssm_conv_kernel", 0),
    ("ssm_conv_act", "swoosh"),
    ("ssm_projected", None),
    ("ssm_projected", "no"),
    ("ssm_chunk_size", 0),
    ("ssm_time_step_min", 0),
    ("ssm_time_step_min", 0.5),
    ("ssm_time_step_max", INF),
    ("ssm_time_step_floor", -1.0),
    ("ssm_time_step_limit", [0.5]),
    ("ssm_time_step_limit", [0.5, 0.1]),
    ("ssm_time_step_limit", [-1.0, 1.0]),
    ("ssm_time_step_limit", [NAN, 1.0]),
    ("ssm_time_step_limit", [0.0, NAN]),
    ("ssm_time_step_limit", None),
    ("windw_size", 9),
    ("sliding_window", 9),
]


@pytest.mark.parametrize(("field", "value"), CONTRADICTIONS, ids=str)
def test_contradictions_name_field_and_value(field, value):
    with pytest.raises(ValueError) as refusal:
        BMojoConfig(**{**BASE, field: value})
    message = str(refusal.value)
    shown = value[0] if isinstance(value, list) and field == "layer_types" and value[:1] == [None] else value
    if field == "layer_types" and value == ["bmojo", "hyena"]:
        shown = "hyena"
    assert message.startswith(field) and (repr(shown) in message or isinstance(value, dict)), message


def test_contradictions_between_fields():
    for fields, message in (
        (dict(hidden_size=18), r"hidden_size=18 is not a multiple of num_attention_heads=4"),
        (dict(ssm_num_heads=3), r"ssm_num_groups=2: must divide ssm_num_heads=3"),
        (dict(ssm_time_step_max=1e-9), r"ssm_time_step_min=0.001: must lie in \(0, ssm_time_step_max=1e-09\]"),
        (
            dict(ssm_projected=False, ssm_head_dim=3),
            r"ssm_projected=False: ssm_num_heads=4 times ssm_head_dim=3 must be hidden_size=16.*ssm_projected=True",
        ),
        (dict(num_hidden_layers=3, layer_types=["bmojo"] * 2), r"has 2 entries but num_hidden_layers=3"),
        (dict(ssm_type="mamba", ssm_norm=True), r"ssm_norm=True: must be False with ssm_type='mamba'.*; leave it out"),
        (dict(ssm_type="mamba", ssm_num_groups=2), r"ssm_num_groups=2: must be 1 with ssm_type='mamba'.*; leave it"),
        (
            dict(ssm_type="mamba", ssm_projected=False),
            r"ssm_projected=False: must be True with ssm_type='mamba'.*; leave",
        ),
        (dict(ssm_type="mamba", ssm_time_step_rank=0), r"ssm_time_step_rank=0: must be an integer >= 1"),
        (dict(ssm_time_step_rank=4), r"ssm_time_step_rank=4: must be None with ssm_type='mamba2'.*; leave it out"),
        (
            dict(ssm_type="gated_delta", ssm_time_step_rank=4),
            r"ssm_time_step_rank=4: must be None with ssm_type='gated_delta'.*; leave it out",
        ),
        (
            dict(ssm_type="gated_delta", ssm_projected=False),
            r"ssm_projected=False: must be True with ssm_type='gated_delta'.*; leave",
        ),
        (
            dict(ssm_type="kalmanet", ssm_projected=False),
            r"ssm_projected=False: must be True with ssm_type='kalmanet'.*; leave",
        ),
        (dict(ssm_type="kalmanet", ssm_expand_rank=0), r"ssm_expand_rank=0: must be an integer >= 1"),
        (dict(window_size=7, fading_stride=3), r"fading_stride=3: must divide window_size=7; a fading token"),
        (dict(window_size=6, fading_stride=3, fading_delay=4), r"fading_stride=3: must divide fading_delay=4"),
        (
            dict(fading_delay=0, fading_mass=True, storage_size=2, fading_stride=2),
            r"fading_delay=0: is of SSM outputs, and fading_mass=True has none; leave it out",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            BMojoConfig(**{**BASE, **fields})


def test_a_config_that_was_changed_is_checked_again():
    config = BMojoConfig(**BASE)
    config.window_size = 0
    with pytest.raises(ValueError, match="window_size=0"):
        BMojoForCausalLM(config)
