"""conversion.align and conversion.finetune end to end on a tiny graft: what they write, and how runs end and go on."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from conversion.grafting.report import read_report
from conversion.training import trainer as trainer_module
from conversion.training.checkpoints import checkpoints, start_work, work_folder
from modeling_bmojo import BMojoForCausalLM
from tests.conversion.graft_sources import W, snapshot
from tests.conversion.training_setup import (
    letters,
    log_of,
    recipe,
    run_align,
    run_finetune,
    tiny_graft,
    write_rows,
    write_text,
)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def new_tensors(folder):
    return {name for name, entry in read_report(folder)["target_tensors"].items() if "initialised-by" in entry}


def is_fresh(tmp_path):
    """Neither an output nor a work folder, and nothing half written."""
    return [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


# What is written --------------------------------------------------------------------------------------------------
def test_alignment_trains_the_new_tensors_and_nothing_else(tmp_path):
    before, source = snapshot(tiny_graft()), tensors(tiny_graft())
    assert run_align(tmp_path, losses={"mixer": 1.0, "kl": 1.0, "hidden": 1.0, "ce": 1.0}) == 0
    out = tmp_path / "out"
    changed = {name for name, value in tensors(out).items() if not torch.equal(value, source[name])}
    # B's random rows and the scalars need not move in four steps; no copied tensor may.
    assert changed <= new_tensors(tiny_graft()) and len(changed) > 6
    assert {value.dtype for value in tensors(out).values()} == {torch.float32}
    assert snapshot(tiny_graft()) == before and not work_folder(out).exists()
    for key in ("loss", "mixer", "kl", "hidden", "ce"):
        assert len(log_of(out, key)) == 4
    total = [sum(values) for values in zip(*(log_of(out, key) for key in ("mixer", "kl", "hidden", "ce")))]
    assert total == pytest.approx(log_of(out), rel=1e-4)
    assert len(log_of(out, "eval_loss")) == 2 and len(log_of(out, "eval_kl")) == 2

    model, info = BMojoForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.use_cache
    fresh = BMojoForCausalLM.from_pretrained(tiny_graft())
    ids = torch.arange(3 * W)[None] % 90 + 3
    with torch.no_grad():
        assert torch.equal(model.eval()(ids[:, :W]).logits, fresh.eval()(ids[:, :W]).logits)
        assert not torch.equal(model(ids).logits, fresh(ids).logits)


def test_a_graft_with_a_storage_is_trained_as_any_other(tmp_path):
    """What is fetched, and means, carry gradients into the projections; the result stores and fetches as before."""
    memory = dict(storage_size=3, fading_mass=True, fading_size=2, fading_stride=2, eidetic_size=0)
    source, train = tiny_graft(**memory), ["model.layers.*.self_attn.?_proj.weight"]
    assert run_align(tmp_path, source=str(source), train=train, losses={"kl": 1.0, "hidden": 1.0}) == 0
    out, again = tmp_path / "out", tmp_path / "again"
    assert run_finetune(tmp_path, source=str(out), output=str(again), train=train) == 0
    before, after = tensors(source), tensors(again)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    layers = range(AutoModelForCausalLM.from_pretrained(again).config.num_hidden_layers)
    assert changed == {f"model.layers.{i}.self_attn.{name}_proj.weight" for i in layers for name in "qkvo"}
    model = BMojoForCausalLM.from_pretrained(again).eval()
    assert {name: getattr(model.config, name) for name in memory} == memory
    ids = torch.arange(4 * W)[None] % 90 + 3
    with torch.no_grad():
        fetching = model(ids).logits
        other = BMojoForCausalLM.from_pretrained(again, storage_size=60).eval()
        assert not torch.equal(fetching, other(ids).logits)
    assert all(value > 0 for value in log_of(out)) and len(log_of(again)) == 4


def test_report_card_and_folder_of_the_result(tmp_path):
    assert run_align(tmp_path, losses={"mixer": 1.0}) == 0
    out, source = tmp_path / "out", tiny_graft()
    report = read_report(out)
    assert {path.name for path in source.iterdir()} <= {path.name for path in out.iterdir()}
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((source / name).read_text())
    assert report["source"] == read_report(source)["source"] and report["identical_up_to"] == W
    (entry,) = report["training"]
    assert (entry["program"], entry["steps"], entry["trained_tensors"]) == ("align", 4, len(new_tensors(source)))
    assert entry["settings"]["losses"]["mixer"] == 1.0 and entry["loss"]["first"]["loss"] == log_of(out)[0]
    trained = {name for name, item in report["target_tensors"].items() if item.get("trained-by") == ["align"]}
    assert trained == new_tensors(source)
    card = (out / "README.md").read_text()
    assert "nothing was trained" in (source / "README.md").read_text()
    assert "nothing was trained" not in card and "aligned with its source for 4 steps" in card
    assert f"Up to {W} tokens its logits are still those of the source" in card
    # The result can be trained again.
    assert run_finetune(tmp_path, source=str(out), output=str(tmp_path / "again"), train="all") == 0
    report = read_report(tmp_path / "again")
    assert [item["program"] for item in report["training"]] == ["align", "finetune"]
    assert report["identical_up_to"] == 0
    assert "still those of the source" not in (tmp_path / "again" / "README.md").read_text()


def test_alignment_lowers_its_loss(tmp_path):
    """On one row, again and again: new tensors and the projections that read them."""
    trained = ["new", "model.layers.*.self_attn.?_proj.weight"]
    data = {"files": write_text(tmp_path / "one", 1, 50), "held_out": 0}
    trainer = {"max_steps": 20, "learning_rate": 2e-3}
    assert run_align(tmp_path, losses={"kl": 1.0}, train=trained, data=data, trainer=trainer) == 0
    losses = log_of(tmp_path / "out")
    assert losses[-1] < 0.8 * losses[0]


def test_fine_tuning_lowers_its_loss_and_keeps_what_does_not_train(tmp_path):
    data = {"files": write_text(tmp_path / "one", 1, 50), "held_out": 0}
    options = {"data": data, "trainer": {"max_steps": 8}, "train": ["model.layers.1.*"]}
    assert run_finetune(tmp_path, **options) == 0
    losses, source = log_of(tmp_path / "out"), tensors(tiny_graft())
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, value in tensors(tmp_path / "out").items() if not torch.equal(value, source[name])}
    assert changed and all(name.startswith("model.layers.1.") for name in changed)


def test_memory_fields_may_change_and_are_kept(tmp_path):
    memory = {"window_size": W // 2, "eidetic_size": 3}
    assert run_align(tmp_path, losses={"mixer": 1.0}, memory=memory, data={"sequence_length": W + 3}) == 0
    config = BMojoForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.window_size, config.eidetic_size) == (W // 2, 3)
    assert read_report(tmp_path / "out")["identical_up_to"] == W // 2
    assert f"Up to {W // 2} tokens its logits are still" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("delay", [0, W // 2])
def test_with_a_delay_below_the_window_less_is_said_to_be_the_sources(delay, tmp_path):
    """Fading tokens are seen inside the window: it is aligned as well, and its logits are not the graft's any more."""
    memory = {"fading_delay": delay, "fading_size": 1, "fading_stride": 1}
    assert run_align(tmp_path, losses={"kl": 1.0}, memory=memory, data={"sequence_length": W + 3}) == 0
    assert read_report(tmp_path / "out")["identical_up_to"] == delay
    card = (tmp_path / "out" / "README.md").read_text()
    assert (f"Up to {delay} tokens its logits are still" in card) == (delay > 0)
    model, graft = (BMojoForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "out", tiny_graft()))
    ids = torch.arange(W)[None]
    with torch.no_grad():
        apart = (model(ids).logits - graft(ids).logits)[0].abs().amax(-1)
    assert model.config.alone == delay and (apart[:delay] < 1e-4).all() and (apart[delay:] > 1e-4).any()


def test_narrow_weights_with_mixed_precision(tmp_path):
    trainer = {"bf16": True, "use_cpu": True}
    assert run_align(tmp_path, losses={"kl": 1.0, "mixer": 1.0}, dtype="bfloat16", trainer=trainer) == 0
    kinds = {".scalars." in name: value.dtype for name, value in tensors(tmp_path / "out").items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert read_report(tmp_path / "out")["dtype"] == "bfloat16"


def test_a_teacher_by_name(tmp_path):
    teacher = str(tiny_graft().parent / "source")
    assert run_align(tmp_path, losses={"kl": 1.0, "hidden": 1.0}, teacher=teacher) == 0
    assert run_align(tmp_path, "--overwrite", losses={"kl": 1.0, "hidden": 1.0}, output=str(tmp_path / "shared")) == 0
    assert log_of(tmp_path / "out") == pytest.approx(log_of(tmp_path / "shared"), rel=1e-3)


# Accumulation --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("program", [run_align, run_finetune], ids=["align", "finetune"])
def test_gradient_accumulation_computes_the_same(program, tmp_path):
    """Rows with different numbers of counted tokens, in one batch and in three."""
    rows = [{"text": letters(count, seed)} for seed, count in enumerate((47, 30, 20, 45, 25, 35, 40, 28, 22))]
    data = {"files": write_rows(tmp_path / "a.jsonl", rows), "packing": "none", "held_out": 0}
    options = {"losses": {"kl": 1.0, "hidden": 1.0}} if program is run_align else {}
    logs = {}
    for name, trainer in {
        "together": {"per_device_train_batch_size": 3},
        "apart": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    }.items():
        trainer |= {"max_steps": 3, "learning_rate": 1e-3}
        assert program(tmp_path, output=str(tmp_path / name), data=data, trainer=trainer, **options) == 0
        logs[name] = log_of(tmp_path / name)
    assert len(logs["apart"]) == 3 and logs["apart"] == pytest.approx(logs["together"], rel=1e-5)


# Runs that end early and go on -------------------------------------------------------------------------------------
class StopAt(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(n, action)`: the next run does this at the end of step n."""
    made = trainer_module.BMojoTrainer.__init__

    def arrange(step, action):
        def build(self, *arguments, callbacks, **options):
            made(self, *arguments, callbacks=[StopAt(step, action), *callbacks], **options)

        monkeypatch.setattr(trainer_module.BMojoTrainer, "__init__", build)

    yield arrange


def fail():
    raise OSError("the disk is gone")


CASES = {
    "align": (run_align, {"losses": {"mixer": 1.0, "kl": 0.5}}),
    "finetune": (run_finetune, {"train": ["new", "model.layers.1.*"]}),
    "lora": (run_finetune, {"lora": {"r": 2, "dropout": 0.1}}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(case, tmp_path, at_step, monkeypatch, capsys):
    program, options = CASES[case]
    options |= {"trainer": {"max_steps": 6, "gradient_accumulation_steps": 2, "num_train_epochs": 3}}
    options["data"] = {"files": write_text(tmp_path / "few", 3)}  # more than one epoch in six steps
    assert program(tmp_path, output=str(tmp_path / "whole"), **options) == 0
    with monkeypatch.context():
        at_step(5, fail)
        assert program(tmp_path, **options) == 2
    assert "the disk is gone" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert [path.name for path in checkpoints(work_folder(tmp_path / "out"))] == ["checkpoint-2", "checkpoint-4"]
    assert program(tmp_path, "--resume", **options) == 0
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert log_of(tmp_path / "out", key) == log_of(tmp_path / "whole", key), key
    files = [path.name for path in (tmp_path / "whole").glob("*.safetensors")]
    for name in files:
        found, expected = load_file(tmp_path / "out" / name), load_file(tmp_path / "whole" / name)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert files and not work_folder(tmp_path / "out").exists()


def test_checkpoints_hold_only_what_trains(tmp_path, at_step):
    at_step(3, fail)
    assert run_align(tmp_path, losses={"mixer": 1.0}) == 2
    (checkpoint,) = checkpoints(work_folder(tmp_path / "out"))
    held = load_file(checkpoint / "trained.safetensors")
    assert held.keys() == {"student." + name for name in new_tensors(tiny_graft())}
    assert not (checkpoint / "model.safetensors").exists() and (checkpoint / "optimizer.pt").is_file()


def test_ctrl_c_ends_the_step_with_a_checkpoint(tmp_path, at_step, capsys, monkeypatch):
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    assert run_align(tmp_path, losses={"mixer": 1.0}) == 130
    told = capsys.readouterr().err
    assert "stopped after step 3" in told and "--resume goes on from it" in told
    assert [path.name for path in checkpoints(work_folder(tmp_path / "out"))] == ["checkpoint-2", "checkpoint-3"]
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert run_align(tmp_path, losses={"mixer": 1.0}) == 2
    assert "holds an unfinished run at step 3" in capsys.readouterr().err
    assert run_align(tmp_path, "--finish", "last", losses={"mixer": 1.0}) == 0
    assert read_report(tmp_path / "out")["training"][0]["steps"] == 3
    held = load_file(checkpoints(work_folder(tmp_path / "out"))[-1] / "trained.safetensors")
    written = tensors(tmp_path / "out")
    assert all(torch.equal(written[name.removeprefix("student.")], value) for name, value in held.items())
    assert run_align(tmp_path, "--resume", losses={"mixer": 1.0}) == 0
    assert read_report(tmp_path / "out")["training"][0]["steps"] == 4


def test_a_second_ctrl_c_stops_at_once(tmp_path, at_step):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    at_step(3, twice)
    assert run_align(tmp_path, losses={"mixer": 1.0}) == 130
    assert [path.name for path in checkpoints(work_folder(tmp_path / "out"))] == ["checkpoint-2"]


def test_another_recipe_is_not_resumed(tmp_path, at_step, monkeypatch, capsys):
    at_step(3, fail)
    assert run_align(tmp_path, losses={"mixer": 1.0}) == 2
    monkeypatch.undo()
    capsys.readouterr()
    assert run_align(tmp_path, "--resume", losses={"mixer": 1.0, "kl": 1.0}, trainer={"learning_rate": 0.5}) == 2
    told = capsys.readouterr().err
    assert "losses.kl: 0.0 then, 1.0 now" in told and "trainer.learning_rate: 0.01 then, 0.5 now" in told
    assert "losses.mixer" not in told
    assert run_align(tmp_path, "--finish", "last", losses={"kl": 1.0}) == 2
    other = {"files": write_text(tmp_path / "other", tokens=130)}
    assert run_align(tmp_path, "--resume", losses={"mixer": 1.0}, data=other) == 2
    assert "data_files" in capsys.readouterr().err
    assert checkpoints(work_folder(tmp_path / "out"))


def test_what_is_only_shown_or_kept_may_change_on_resuming(tmp_path, at_step, monkeypatch):
    at_step(3, fail)
    assert run_align(tmp_path, losses={"mixer": 1.0}) == 2
    monkeypatch.undo()
    assert (
        run_align(tmp_path, "--resume", losses={"mixer": 1.0}, trainer={"logging_steps": 2, "save_total_limit": 1}) == 0
    )


def test_checkpoints_cut_short_are_never_used(tmp_path, at_step, monkeypatch):
    at_step(3, fail)
    assert run_align(tmp_path, losses={"mixer": 1.0}) == 2
    monkeypatch.undo()
    work = work_folder(tmp_path / "out")
    (work / "checkpoint-3").mkdir()
    (work / "checkpoint-3" / "trained.safetensors").write_bytes(b"half")
    (work / "checkpoint-3" / "trainer_state.json").write_text('{"epo')
    assert [path.name for path in checkpoints(work)] == ["checkpoint-2"]
    assert run_align(tmp_path, "--resume", losses={"mixer": 1.0}) == 0


def test_a_failed_save_leaves_no_half_checkpoint(tmp_path, monkeypatch, capsys):
    save = trainer_module.BMojoTrainer._save_rng_state
    count = []

    def failing(self, folder):
        count.append(folder)
        if len(count) == 2:
            fail()
        save(self, folder)

    monkeypatch.setattr(trainer_module.BMojoTrainer, "_save_rng_state", failing)
    assert run_align(tmp_path, losses={"mixer": 1.0}) == 2
    assert [path.name for path in work_folder(tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_best_checkpoint_becomes_the_result(tmp_path, at_step, monkeypatch):
    """A learning rate that begins at 0 and then ruins the model: the first evaluation is the best one."""
    trainer = {"max_steps": 6, "learning_rate": 1.0, "warmup_steps": 6, "save_steps": 1}
    options = {"losses": {"kl": 1.0}, "keep": "best", "trainer": trainer}
    assert run_align(tmp_path, **options) == 0
    held_out = log_of(tmp_path / "out", "eval_loss")
    assert held_out[0] == min(held_out) < held_out[-1] / 2
    entry = read_report(tmp_path / "out")["training"][0]
    assert entry["held_out"]["best"] == min(held_out)
    at_step(5, fail)
    assert run_align(tmp_path, output=str(tmp_path / "other"), **options) == 2
    monkeypatch.undo()
    held = load_file(work_folder(tmp_path / "other") / "checkpoint-1" / "trained.safetensors")
    assert run_align(tmp_path, "--finish", "best", output=str(tmp_path / "other"), **options) == 0
    written = tensors(tmp_path / "other")
    assert all(torch.equal(written[name.removeprefix("student.")], value) for name, value in held.items())


# A loss that is not finite -------------------------------------------------------------------------------------------
def poison(monkeypatch, step, what):
    """Makes the loss, or a gradient, of one step not finite."""
    compute = trainer_module.BMojoTrainer.compute_loss

    def poisoned(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = compute(self, model, inputs, return_outputs, num_items_in_batch)
        if self.state.global_step + 1 == step and model.training:
            if what == "loss":
                return found * float("nan")
            found.register_hook(lambda gradient: gradient * float("inf"))
        return found

    monkeypatch.setattr(trainer_module.BMojoTrainer, "compute_loss", poisoned)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("program", [run_align, run_finetune], ids=["align", "finetune"])
def test_a_loss_that_is_not_finite_stops_the_run(program, what, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 4, what)
    assert program(tmp_path) == 2
    told = capsys.readouterr().err
    assert "error: step 4: the " + what in told and "on rows [" in told and "checkpoint-2' (step 2)" in told
    held = load_file(checkpoints(work_folder(tmp_path / "out"))[-1] / "trained.safetensors")
    assert all(value.isfinite().all() for value in held.values()) and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert program(tmp_path, "--finish", "last") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(value.isfinite().all() for value in model.parameters())


# Adapters -----------------------------------------------------------------------------------------------------------
def test_lora_writes_an_adapter_and_the_merged_model(tmp_path):
    from peft import PeftModel

    lora = {"r": 2, "alpha": 4, "merge": True, "modules_to_save": ["scalars"]}
    assert run_finetune(tmp_path, lora=lora) == 0
    out, ids = tmp_path / "out", torch.arange(3 * W)[None] % 90 + 3
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4) and "in_proj" in config["target_modules"]
    assert not (out / "model.safetensors").exists() and (out / "tokenizer.json").is_file()
    base = BMojoForCausalLM.from_pretrained(tiny_graft())
    with torch.no_grad():
        plain = base(ids, use_cache=False).logits.clone()
        adapted = PeftModel.from_pretrained(base, out).eval()(input_ids=ids, use_cache=False).logits
        merged = BMojoForCausalLM.from_pretrained(out / "merged")(ids, use_cache=False).logits
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert "fine-tuned on next tokens for 4 steps" in (out / "README.md").read_text()
    report = read_report(out / "merged")
    assert read_report(out)["adapter"] and report["training"][0]["program"] == "finetune"
    before, after = tensors(tiny_graft()), tensors(out / "merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    told = {name for name, item in report["target_tensors"].items() if item.get("trained-by") == ["finetune"]}
    assert changed <= told and "model.layers.0.self_attn.q_proj.weight" in changed
    assert all(name.endswith("_proj.weight") or ".scalars." in name for name in told)
    assert report["identical_up_to"] == 0
    assert "still those of the source" not in (out / "merged" / "README.md").read_text()
    assert run_finetune(tmp_path, lora=lora) == 2  # the folder is ours, and not replaced unless asked
    assert run_finetune(tmp_path, "--overwrite", lora=lora) == 0


# Refusals -----------------------------------------------------------------------------------------------------------
REFUSED = {
    "a source that is no folder": ({"source": "nowhere"}, "no such folder; graft one first"),
    "a pattern without a match": ({"train": ["model.layrs.*"]}, "'model.layrs.*' matches no tensor"),
    "narrow weights alone": ({"dtype": "bfloat16"}, "mixed precision is needed"),
    "memory that changes tensors": ({"memory": {"ssm_state_size": 7}}, "would change 6 tensors"),
    "nothing to learn": ({"memory": {"fading_size": 0}}, "with fading_size=0 nothing"),
    "nothing held out": ({"data": {"held_out": 0}, "keep": "best"}, "keep='best': goes by the loss on held-out"),
    "sequences within the window": ({"data": {"sequence_length": W}}, "no position of a sequence would count"),
    "a trainer field": ({"trainer": {"lerning_rate": 1}}, "did you mean 'learning_rate'"),
    "a field of ours": ({"trainer": {"output_dir": "x"}}, r"trainer.output_dir: is decided elsewhere; set output"),
    "an impossible value": ({"trainer": {"lr_scheduler_type": "sideways"}}, "error: trainer: "),
    "a teacher that is not there": ({"teacher": "no/where"}, "teacher='no/where': does not load"),
}
SHARDED = {
    "a shared teacher": ({}, "teacher: FSDP spreads the student's tensors"),
    "mixers by themselves": (
        {"teacher": "another", "losses": {"mixer": 1.0}},
        "losses.mixer_inputs='teacher': runs the student's mixers by themselves",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case, tmp_path, capsys):
    values, message = REFUSED[case]
    assert run_align(tmp_path, **values) == 2
    told = capsys.readouterr().err
    assert "error: " in told and message in told
    assert is_fresh(tmp_path)


def test_an_ssm_that_is_only_judged_learns_by_the_tests_gradient(tmp_path):
    """Without fading tokens and without that gradient there is "nothing to learn", above."""
    memory = {"fading_size": 0, "innovation": "output", "innovation_gradient": 3.0}
    assert run_align(tmp_path, memory=memory, train=["model.layers.*.fading.*"]) == 0
    before, after = tensors(tiny_graft()), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".fading." in name for name in changed)


@pytest.mark.parametrize("case", SHARDED)
def test_what_needs_whole_tensors_is_refused_where_they_are_spread(case, tmp_path, capsys, monkeypatch):
    values, message = SHARDED[case]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert run_align(tmp_path, **values) == 2
    assert f"error: {message}" in capsys.readouterr().err and is_fresh(tmp_path)


def test_sources_that_are_no_checkpoint_of_ours(tmp_path, capsys):
    assert run_align(tmp_path, source=str(tiny_graft().parent / "source")) == 2
    assert "is a llama model, not a B'MOJO checkpoint" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run_align(tmp_path, source=str(tmp_path / "empty")) == 2
    assert "has no readable config.json" in capsys.readouterr().err
    BMojoForCausalLM.from_pretrained(tiny_graft()).save_pretrained(tmp_path / "bare")
    assert run_align(tmp_path, source=str(tmp_path / "bare")) == 2
    assert "does not load" in capsys.readouterr().err  # no tokenizer
    assert is_fresh(tmp_path)


def test_a_checkpoint_without_a_report_trains_by_patterns_only(tmp_path, capsys):
    import shutil

    shutil.copytree(tiny_graft(), tmp_path / "bare")
    (tmp_path / "bare" / "graft_report.json").unlink()
    bare = {"source": str(tmp_path / "bare"), "losses": {"kl": 1.0}}
    assert run_align(tmp_path, **bare) == 2
    assert "has no graft_report.json that says which tensors are new" in capsys.readouterr().err
    assert run_align(tmp_path, train=["model.layers.*.fading.*"], **bare) == 2
    assert "does not say what the source's layers were" in capsys.readouterr().err
    teacher = str(tiny_graft().parent / "source")
    assert run_align(tmp_path, train=["model.layers.*.fading.*"], teacher=teacher, **bare) == 0


def test_tensors_that_no_loss_reaches_are_refused_at_the_first_step(tmp_path, capsys):
    assert run_align(tmp_path, losses={"mixer": 1.0}, train=["new", "model.norm.weight"]) == 2
    told = capsys.readouterr().err
    assert "the losses do not depend on 1 of the tensors" in told and "model.norm.weight" in told


def test_outputs_are_not_replaced_unless_asked(tmp_path, capsys):
    assert run_align(tmp_path, "--resume") == 2
    assert "--resume: there is no checkpoint" in capsys.readouterr().err
    assert run_align(tmp_path, output=str(tiny_graft())) == 2
    assert "holds the source" in capsys.readouterr().err
    assert run_align(tmp_path) == 0
    before = snapshot_of_weights(tmp_path / "out")
    assert run_align(tmp_path) == 2
    assert "pass --overwrite to replace it" in capsys.readouterr().err
    assert snapshot_of_weights(tmp_path / "out") == before
    assert run_align(tmp_path, "--overwrite", trainer={"learning_rate": 0.1}) == 0
    assert snapshot_of_weights(tmp_path / "out") != before


def test_a_work_folder_with_other_files_is_never_emptied(tmp_path, capsys):
    work = work_folder(tmp_path / "out")
    work.mkdir()
    (work / "thesis.txt").write_text("ten years")
    for recipe_of_others in (None, '{"flour": 500}', "[]", "half a reci"):
        if recipe_of_others is not None:
            (work / "recipe.json").write_text(recipe_of_others)
        before = snapshot(work)
        for flags in ((), ("--overwrite",)):
            assert run_align(tmp_path, *flags) == 2
            told = capsys.readouterr().err
            assert "output=" in told and "no work folder of ours" in told and "move it away" in told
            assert snapshot(work) == before
        with pytest.raises(ValueError, match="no work folder of ours"):
            start_work(tmp_path / "out", {})
        assert snapshot(work) == before


def test_work_folders_of_ours_are_started_anew(tmp_path):
    output, recipe_of_ours = tmp_path / "out", {"source": "a", "seed": 0, "data.packing": "none"}
    work_folder(output).mkdir()
    work = start_work(output, recipe_of_ours)
    (work / "checkpoint-2").mkdir()
    assert [path.name for path in start_work(output, recipe_of_ours).iterdir()] == ["recipe.json"]


def snapshot_of_weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_lora_that_fits_nothing(tmp_path, capsys):
    assert run_finetune(tmp_path, lora={"target_modules": ["qproj"]}) == 2
    assert "error: lora.target_modules=['qproj']: 'qproj' matches nothing" in capsys.readouterr().err
    assert is_fresh(tmp_path)


def test_recipes_of_these_tests_are_complete(tmp_path):
    assert {"source", "output", "data", "trainer"} == recipe(tmp_path).keys()
