"""Adapters by conversion.finetune's command line: what it says at its end, and what it refuses before any work."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conversion import finetune
from conversion.grafting.report import read_report
from tests.conversion.training_setup import letters, log_of, run_finetune, tiny_graft, write_rows


def is_fresh(tmp_path):
    return [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


# What is told at the end -------------------------------------------------------------------------------------------
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DORA = {"r": 4, "use_dora": True, "target_modules": ATTENTION}


@pytest.mark.parametrize("lora", [{"r": 2}, {"r": 2, "recipe": "hylora"}, DORA], ids=str)
def test_losses_before_and_after_sizes_and_time(lora, tmp_path, capsys):
    """Four steps, evaluated before the first and after the last one."""
    assert run_finetune(tmp_path, lora=lora, trainer={"save_steps": 3}) == 0
    told, out = capsys.readouterr().out, tmp_path / "out"
    steps = [entry["step"] for entry in json.loads((out / "training_log.json").read_text()) if "eval_loss" in entry]
    losses = log_of(out, "eval_loss")
    assert steps == [0, 3, 4]
    assert f"Loss on held-out text {losses[0]:.4g} before training, {losses[-1]:.4g} after step 4." in told
    size = (out / "adapter_model.safetensors").stat().st_size
    trained, parameters, share = re.search(
        r"([\d,]+) of ([\d,]+) parameters trained \((.*)%\)\. The adapter", told
    ).groups()
    trained, parameters = (int(number.replace(",", "")) for number in (trained, parameters))
    assert f"takes {size / 1e6:.1f} MB" in told and 0 < size - 4 * trained < 20_000  # float32 and a header
    assert share == f"{100 * trained / parameters:.2f}"
    entry = read_report(out)["training"][-1]
    assert entry["parameters"] == {"trained": trained, "all": parameters}
    assert re.search(r"[\d,]+ s \([\d,]+ s of CPU time\); .* at the peak\.", told)


@pytest.mark.parametrize("mixed", [True, False])
def test_on_a_narrow_base_what_trains_is_float32(mixed, tmp_path):
    """Convolutions and scalars too: the steps of an optimiser are lost in the rounding of bfloat16."""
    lora = {"r": 2, "recipe": "hylora", "ssm_scalars": True, "merge": True}
    trainer = {"bf16": mixed, "use_cpu": True}
    assert run_finetune(tmp_path, lora=lora, dtype="bfloat16", trainer=trainer) == 0
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    assert any(".conv." in name for name in adapter) and any(".scalars." in name for name in adapter)
    merged = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    kinds = {".scalars." in name: value.dtype for name, value in merged.items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_whole_models_have_no_adapter_to_tell_of(tmp_path, capsys):
    assert run_finetune(tmp_path, data={"held_out": 0}) == 0
    told = capsys.readouterr().out
    entry = read_report(tmp_path / "out")["training"][-1]
    assert entry["parameters"]["trained"] == entry["parameters"]["all"] > 10_000
    assert "(100.00%)." in told and "adapter" not in told and "held-out" not in told


def test_the_first_loss_on_held_out_text_is_the_sources(tmp_path):
    """An adapter starts as nothing: two adapters, one loss before training."""
    assert run_finetune(tmp_path, lora={"r": 2}) == 0
    assert run_finetune(tmp_path, lora=DORA, output=str(tmp_path / "other")) == 0
    first, other = (log_of(tmp_path / name, "eval_loss")[0] for name in ("out", "other"))
    assert first == pytest.approx(other, rel=1e-4)


# Refused -----------------------------------------------------------------------------------------------------------
REFUSED = {
    "a rank of 0": ({"r": 0}, "lora.r=0: must be a rank >= 1; e.g. 16"),
    "a negative rank": ({"r": -4}, "lora.r=-4: must be a rank >= 1"),
    "targets that match nothing": (
        {"target_modules": ["query"]},
        "lora.target_modules=['query']: 'query' matches nothing in the model; known names: ",
    ),
    "one target of two": ({"target_modules": ["q_proj", "kproj"]}, "'kproj' matches nothing in the model"),
    "no target": ({"target_modules": []}, "lora.target_modules=[]: is empty; known names: "),
    "a pattern that matches nothing": ({"target_modules": "q_proj"}, "lora.target_modules='q_proj': 'q_proj' matches"),
    "no pattern": ({"target_modules": "*_proj"}, "lora.target_modules='*_proj': is no regular expression"),
    "a convolution": ({"target_modules": ["conv"]}, "'conv' matches nothing in the model; known names: "),
    "modules in full": ({"modules_to_save": ["scalar"]}, "lora.modules_to_save=['scalar']: 'scalar' matches nothing"),
    "DoRA on rows of zeros": (
        {"use_dora": True},
        "lora: use_dora=True: DoRA divides by the length of every row of a weight, and in_proj has rows of zeros",
    ),
    "an unknown recipe": ({"recipe": "dora"}, "lora: recipe='dora': must be one of ['lora', 'hylora']; DoRA is"),
    "an unknown setting": ({"rank": 4}, "lora.rank: no such setting"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case, tmp_path, capsys):
    values, message = REFUSED[case]
    assert run_finetune(tmp_path, lora=values) == 2
    told = capsys.readouterr().err
    assert "error: " in told and message in told
    if "known names" in told:
        assert "q_proj, k_proj, v_proj, o_proj" in told and "remove" in told
    assert is_fresh(tmp_path)


@pytest.mark.parametrize("targets", ["all-linear", r".*self_attn\.[qk]_proj", ["q_proj", "embed_tokens"]], ids=str)
def test_targets_that_peft_knows_pass(targets, tmp_path):
    assert run_finetune(tmp_path, lora={"r": 2, "target_modules": targets}, trainer={"max_steps": 1}) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"]


def test_a_row_without_the_needed_field(tmp_path, capsys):
    rows = [{"text": letters(60, seed), "source": "x"} for seed in range(6)]
    rows[3]["text"] = None
    files = write_rows(tmp_path / "rows.jsonl", rows)
    assert run_finetune(tmp_path, lora={"r": 2}, data={"files": files, "held_out": 0.3}) == 2
    told = capsys.readouterr().err
    assert (
        f"error: row 4 of {files!r} (the first is 1): its 'text' is missing, must be str; the row has source." in told
    )
    assert "Correct or remove it" in told and is_fresh(tmp_path)


def test_an_adapter_is_no_source(tmp_path, capsys):
    assert run_finetune(tmp_path, lora={"r": 2}, trainer={"max_steps": 1}) == 0
    capsys.readouterr()
    adapter = str(tmp_path / "out")
    assert run_finetune(tmp_path, source=adapter, lora={"r": 2}, output=str(tmp_path / "more")) == 2
    told = capsys.readouterr().err
    assert f"error: source={adapter!r}: is an adapter, not a model; give its base, {str(tiny_graft())!r}" in told
    assert not (tmp_path / "more").exists()


def test_memory_changes_need_a_merged_result(tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    values = {"source": str(tiny_graft()), "output": str(tmp_path / "out"), "data": {"builtin": "pydoc"}, "lora": {}}
    path.write_text(yaml.safe_dump({**values, "memory": {"window_size": 8}}))
    assert finetune.main([str(path)]) == 2
    assert "set lora.merge: true, whose result has them, or remove `memory`" in capsys.readouterr().err
    assert is_fresh(tmp_path)
