"""What PEFT is told about B'MOJO: default targets, configurations, coverage; and what is refused, with which words."""

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from modeling_bmojo import (
    AUTO_CLASSES,
    BMojoConfig,
    BMojoForCausalLM,
    BMojoModel,
    bmojo_lora_config,
    check_adapter,
    lora_coverage,
    peft_bmojo,
    print_lora_coverage,
)
from modeling_bmojo.adapters import lora
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, UNPROJECTED


ROOT = Path(__file__).resolve().parents[3]
MODELS = {
    "mamba2": {},
    "s6": dict(ssm_type="mamba"),
    "delta": dict(ssm_type="gated_delta"),
    "kalma": dict(ssm_type="kalmanet", ssm_solver_steps=5, ssm_expand_rank=2),
    "mixed": MIXED_LAYERS,
    "unprojected": UNPROJECTED,
    "untied": dict(tie_fading_projections=False),
    "untied without fading tokens": dict(tie_fading_projections=False, fading_size=0),
    "attention": dict(layer_types=["full_attention", "sliding_attention"]),
    "mamba-2 stack": dict(layer_types=["linear_attention"] * 2, intermediate_size=0),
    "s6 stack": dict(layer_types=["linear_attention"] * 2, intermediate_size=0, ssm_type="mamba"),
}
WITHOUT_SSM = {"attention"}


def build(name="mamba2", cls=BMojoForCausalLM, **fields):
    return randomize_(cls(BMojoConfig(**{**SIZES, "pad_token_id": 0, **MODELS[name], **fields}))).eval()


def linear_names(model: nn.Module) -> set[str]:
    """Names of the linear maps inside layers."""
    return {n.rpartition(".")[2] for n, m in model.named_modules() if ".layers." in n and isinstance(m, nn.Linear)}


# Default targets -----------------------------------------------------------------------------------------------------
def test_importing_the_package_imports_no_peft_and_peft_knows_bmojo_when_it_comes():
    code = """
import sys, modeling_bmojo
assert not [name for name in sys.modules if name.partition(".")[0] == "peft"], "PEFT was imported"
from peft.tuners.lora import LoraModel
print(*LoraModel.target_module_mapping["bmojo"])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert tuple(run.stdout.split()) == tuple(peft_bmojo.all_targets())


def test_registering_once_more_changes_nothing_and_a_users_entry_stays(monkeypatch):
    finders = list(sys.meta_path)
    table = {"bmojo": ["q_proj"]}
    tables = SimpleNamespace(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING=table)
    monkeypatch.setitem(sys.modules, peft_bmojo.PEFT_TABLES, tables)
    peft_bmojo.register_with_peft()
    assert table == {"bmojo": ["q_proj"]} and sys.meta_path == finders
    table.clear()
    peft_bmojo.register_with_peft()
    assert table == {"bmojo": peft_bmojo.all_targets()}
    peft_bmojo.fill_tables(SimpleNamespace())  # a PEFT without the table


def test_the_import_hook_is_set_once_and_finds_nothing_else(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, peft_bmojo.PEFT_TABLES)
    for _ in range(2):
        peft_bmojo.register_with_peft()
    hooks = [finder for finder in sys.meta_path if type(finder).__name__ == "_FillsTables"]
    assert len(hooks) == 1
    assert hooks[0].find_spec("json") is None
    module = importlib.util.module_from_spec(spec := hooks[0].find_spec(peft_bmojo.PEFT_TABLES, peft.utils.__path__))
    spec.loader.exec_module(module)
    assert module.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["bmojo"] == peft_bmojo.all_targets()


@pytest.mark.parametrize("name", MODELS)
def test_without_targets_every_projection_is_adapted(name):
    model = build(name)
    expected = linear_names(model)
    rows = lora_coverage(get_peft_model(model, LoraConfig(r=2)))
    assert set().union(*(row.adapted for row in rows)) == expected


# Configurations ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_targets_are_the_projections_that_the_model_has(name):
    model = build(name)
    for given in (model, model.config):
        assert set(bmojo_lora_config(given).target_modules) == linear_names(model)
    assert set(bmojo_lora_config().target_modules) == set(peft_bmojo.all_targets()) >= linear_names(model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scalars", [False, True])
@pytest.mark.parametrize("recipe", ["lora", "hylora"])
def test_recipes_train_what_they_say(recipe, scalars, name):
    model = build(name)
    in_full = {"lora": set(), "hylora": {"conv"}}[recipe] | ({"scalars"} if scalars else set())
    if in_full and name in WITHOUT_SSM:
        with pytest.raises(ValueError, match="this model has no SSM; use recipe='lora'"):
            bmojo_lora_config(model, recipe, ssm_scalars=scalars)
        return
    wrapped = get_peft_model(model, bmojo_lora_config(model, recipe, ssm_scalars=scalars, r=2))
    for row in lora_coverage(wrapped):
        has_ssm = row.kind in ("bmojo", "linear_attention")
        assert set(row.in_full) == (in_full if has_ssm else set())
        assert bool(row.adapted) == (row.layer != "outside")
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "modules_to_save" in n for n in trained)
    assert trained


def test_options_reach_peft_and_win():
    config = bmojo_lora_config(build(), r=4)
    assert (config.r, config.lora_alpha, config.task_type) == (4, 8, "CAUSAL_LM")
    config = bmojo_lora_config(r=4, lora_alpha=3, use_dora=True, use_rslora=True, lora_dropout=0.1, bias="all")
    assert (config.lora_alpha, config.use_dora, config.use_rslora, config.lora_dropout) == (3, True, True, 0.1)
    assert bmojo_lora_config(target_modules=["q_proj"]).target_modules == {"q_proj"}
    config = bmojo_lora_config(recipe="hylora", modules_to_save=["lm_head", "conv"])
    assert config.modules_to_save == ["conv", "lm_head"]
    with pytest.raises(TypeError, match="rank"):
        bmojo_lora_config(rank=4)


def test_the_task_follows_the_head():
    classes = {cls.__name__ for cls in AUTO_CLASSES.values()}
    assert set(lora.TASKS) == classes
    for cls in AUTO_CLASSES.values():
        model = build(cls=cls)
        config = bmojo_lora_config(model, r=2)
        wrapped = get_peft_model(model, config)
        assert bmojo_lora_config(wrapped).task_type == config.task_type
        assert wrapped(input_ids=torch.tensor([[1, 2, 3]]))[0].isfinite().all()
    assert bmojo_lora_config(build(cls=BMojoModel)).task_type == "FEATURE_EXTRACTION"


@pytest.mark.parametrize("rank", [0, -1, 1.5, "16", None, True])
def test_ranks_below_one_are_refused(rank):
    with pytest.raises(ValueError, match=r"r=.*: the rank must be a whole number of at least 1"):
        bmojo_lora_config(r=rank)


def test_unknown_recipes_and_other_models_are_refused():
    with pytest.raises(ValueError, match=r"recipe='dora': must be one of \['lora', 'hylora'\]; DoRA is use_dora=True"):
        bmojo_lora_config(recipe="dora")
    for other in (nn.Linear(2, 2), "gpt2", {"model_type": "bmojo"}):
        with pytest.raises(ValueError, match="must be a B'MOJO model or BMojoConfig"):
            bmojo_lora_config(other)


def test_dora_is_refused_on_rows_of_zeros_and_nowhere_else():
    """A row without a length has no direction: PEFT's division would make every logit NaN."""
    model = build("mixed")
    bmojo_lora_config(model, use_dora=True)
    with torch.no_grad():
        model.model.layers[3].fading.in_proj.weight[2] = 0
    rest = [name for name in lora.projections(model.config) if name != "in_proj"]
    with pytest.raises(
        ValueError, match=r"use_dora=True: .* in_proj has rows of zeros, .*target_modules=\["
    ) as refused:
        bmojo_lora_config(model, use_dora=True)
    targets = str(refused.value).partition("target_modules=")[2].rstrip(".")
    assert set(eval(targets)) == set(rest)
    config = bmojo_lora_config(model, use_dora=True, target_modules=rest, r=2)
    wrapped = get_peft_model(model, config)
    assert wrapped(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    with pytest.raises(ValueError, match="in_proj has rows of zeros"):  # a second adapter
        bmojo_lora_config(wrapped, use_dora=True)
    for targets in ("all-linear", None):
        with pytest.raises(ValueError, match="in_proj has rows of zeros"):
            bmojo_lora_config(model, use_dora=True, target_modules=targets)
    bmojo_lora_config(model)
    bmojo_lora_config(model.config, use_dora=True)  # no weights to look at


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"needs PEFT .*: pip install 'modeling-bmojo\[train\]'"):
        bmojo_lora_config()


# Coverage ------------------------------------------------------------------------------------------------------------
def test_coverage_counts_what_trains():
    model = build("mixed", tie_word_embeddings=True)
    count = sum(p.numel() for p in model.parameters())
    rows = lora_coverage(model)
    assert [row.layer for row in rows] == [0, 1, 2, 3, "outside"]
    assert sum(row.parameters for row in rows) == count == sum(row.trains for row in rows)
    assert not any(row.adapted or row.frozen for row in rows)
    wrapped = get_peft_model(model, bmojo_lora_config(model, "hylora", r=3, rank_pattern={"q_proj": 5}))
    rows = lora_coverage(wrapped)
    assert (
        sum(row.trains for row in rows),
        sum(row.parameters for row in rows),
    ) == wrapped.get_nb_trainable_parameters()
    assert rows[0].adapted["q_proj"] == 5 and rows[0].adapted["in_proj"] == 3
    assert rows[0].in_full == ("conv",) and "scalars" in rows[0].frozen
    assert rows[-1].frozen == ("embed_tokens", "norm", "lm_head") and rows[-1].trains == 0


def test_coverage_is_of_the_active_adapters():
    model = build()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.add_adapter("other", LoraConfig(r=3, target_modules=["out_proj"]))
    assert lora_coverage(wrapped)[0].adapted == {"q_proj": 2}
    wrapped.set_adapter("other")
    assert lora_coverage(wrapped)[0].adapted == {"out_proj": 3}
    with wrapped.disable_adapter():
        assert lora_coverage(wrapped)[0].adapted == {}
    wrapped.base_model.set_adapter(["default", "other"])
    assert lora_coverage(wrapped)[0].adapted == {"q_proj": 2, "out_proj": 3}


def test_the_printed_table_joins_equal_layers_and_warns_of_untouched_ones(capsys):
    wrapped = get_peft_model(build(num_hidden_layers=5), bmojo_lora_config(r=2, layers_to_transform=[0, 1, 3]))
    with pytest.warns(UserWarning, match=r"nothing is adapted in layers 2, 4: .*bmojo_lora_config"):
        rows = print_lora_coverage(wrapped)
    text = capsys.readouterr().out
    assert rows == lora_coverage(wrapped)
    first = [line.split()[0] for line in text.splitlines()[3:]]
    assert first == ["0-1", "2", "3", "4", "outside"]
    assert "q_proj k_proj v_proj o_proj in_proj out_proj gate_proj up_proj down_proj (2)" in text
    complete = get_peft_model(build(), bmojo_lora_config(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        print_lora_coverage(complete)
    with pytest.raises(ValueError, match="must be a B'MOJO model"):
        print_lora_coverage(nn.Linear(2, 2))


# Refusals ------------------------------------------------------------------------------------------------------------
PROMPTS = {
    "prompt tuning": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "prefix tuning": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    "p-tuning": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=3),
    "multitask": lambda task: peft.MultitaskPromptTuningConfig(task_type=task, num_virtual_tokens=3),
}


@pytest.mark.parametrize("cls", [c for c in AUTO_CLASSES.values() if c is not BMojoModel], ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", PROMPTS)
def test_prompt_methods_are_refused_with_the_reason(method, cls):
    model = build(cls=cls)
    with pytest.raises(ValueError, match=r"leave the window of window_size=5.* no SSM state .* bmojo_lora_config"):
        get_peft_model(model, PROMPTS[method](lora.TASKS[cls.__name__]))
    assert model.get_submodule("model").embed_tokens is not None


def test_what_peft_says_by_itself(tmp_path):
    """Messages that are PEFT's own and clear enough; where one of these fails, ours is due."""
    with pytest.raises(ValueError, match=r"Target modules .*query.* not found in the base model"):
        get_peft_model(build(), bmojo_lora_config(target_modules=["query"]))
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        get_peft_model(build(), LoraConfig(r=0))
    get_peft_model(build(), bmojo_lora_config(r=2)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(build(hidden_size=32), tmp_path)


def saved_adapter(folder, name="mamba2", recipe="hylora", **fields):
    model = build(name, **fields)
    get_peft_model(model, bmojo_lora_config(model, recipe, r=2)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(hidden_size=32), "is for 16 features and the model's projection has 32"),
        (dict(ssm_conv_kernel=3), r"conv.weight has shape \[40, 4\] and the model's \[40, 3\]"),
        (dict(num_hidden_layers=1), "the model has no model.layers.1."),
        (dict(num_hidden_layers=3), "it has nothing for 9 of the model's projections, e.g. model.layers.2."),
        (UNPROJECTED, "the model has no model.layers.0.fading.out_proj"),
    ],
)
def test_an_adapter_of_another_base_is_refused(fields, said, tmp_path):
    folder = saved_adapter(tmp_path)
    check_adapter(build(), folder)
    with pytest.raises(ValueError, match=rf"the adapter belongs to another base, .*{said}"):
        check_adapter(build(**fields), folder)


@pytest.mark.parametrize("options", [dict(layers_to_transform=[0]), dict(target_modules=r".*layers\.0\..*q_proj")])
def test_an_adapter_of_some_layers_fits(options, tmp_path):
    model = build()
    wrapped = get_peft_model(model, bmojo_lora_config(model, r=2, use_dora=True, **options))
    wrapped.save_pretrained(tmp_path)
    check_adapter(build(), tmp_path)
    check_adapter(wrapped, tmp_path)
    check_adapter(wrapped.get_base_model(), tmp_path)


def test_damaged_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no saved adapter"):
        check_adapter(build(), tmp_path)
    saved_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # load_file maps the file
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="the adapter is damaged"):
        check_adapter(build(), tmp_path)
    name = next(name for name in tensors if "q_proj" in name)
    save_file({**tensors, name.replace("q_proj", "w_proj"): tensors[name].clone()}, file)
    with pytest.raises(ValueError, match=r"the model has no model.layers.0.self_attn.w_proj"):
        check_adapter(build(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="the adapter is damaged"):
        check_adapter(build(), tmp_path)
