"""Settings of align and finetune: sections, overrides, and what is refused with which words."""

import pytest
import yaml

from conversion.common.settings import parse_assignments
from conversion.training.arguments import training_arguments
from conversion.training.settings import (
    AlignSettings,
    FinetuneSettings,
    LoraSettings,
    LossSettings,
    build_training_settings,
    load_training_settings,
)


BASE = {"source": "a", "output": "b", "data": {"builtin": "pydoc"}}


def build(kind=AlignSettings, **values):
    return build_training_settings(kind, {**BASE, **values})


def test_defaults():
    align, finetune = build(), build(FinetuneSettings)
    assert align.losses == LossSettings(kl=1.0) and align.train == "new" and align.loss_from is None
    assert finetune.train == "all" and finetune.lora is None
    assert build(FinetuneSettings, lora={}).lora == LoraSettings()
    assert "output" not in align.as_dict()


def test_overrides_reach_into_sections(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({**BASE, "losses": {"kl": 2.0}, "trainer": {"max_steps": 5}}))
    given = [
        "losses.hidden=0.5",
        "trainer.learning_rate=1e-4",
        "data.sequence_length=99",
        "seed=3",
        "memory.window_size=8",
    ]
    settings = load_training_settings(AlignSettings, path, parse_assignments(given))
    assert settings.losses == LossSettings(kl=2.0, hidden=0.5) and settings.data.sequence_length == 99
    assert settings.trainer == {"max_steps": 5, "learning_rate": "1e-4"} and settings.seed == 3
    assert settings.memory == {"window_size": 8}
    assert training_arguments(settings, tmp_path).learning_rate == 1e-4
    with pytest.raises(
        ValueError, match=r"--set source\.x: only data, losses, lora, trainer, memory have values inside"
    ):
        load_training_settings(AlignSettings, path, {"source.x": 1})


def test_numbers_that_yaml_reads_as_text():
    assert build(losses=yaml.safe_load("kl: 1e-2")).losses.kl == 0.01


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sorce": "x"}, "sorce: no such setting; did you mean 'source'"),
        ({"data": {"bultin": "pydoc"}}, r"data\.bultin: no such setting; did you mean 'data\.builtin'"),
        ({"losses": {"kld": 1}}, r"losses\.kld: no such setting; .*[Kk]nown settings: hidden, mixer, kl, ce"),
        ({"lora": {"r": 1}}, "lora: no such setting"),
        ({"source": None}, "source=None: must be given"),
        ({"data": None}, "data: must be given"),
        ({"data": "pydoc"}, "data='pydoc': must be a section"),
        ({"data": {}}, "give exactly one of files, hub, builtin; found none"),
        ({"data": {"builtin": "pydoc", "files": "x"}}, r"found \['files', 'builtin'\]"),
        ({"data": {"builtin": "other"}}, r"data\.builtin='other': must be one of"),
        ({"data": {"files": 3}}, r"data\.files=3: must be of type str or list\[str\] or null"),
        (
            {"data": {"builtin": "pydoc", "sequence_length": "long"}},
            r"data\.sequence_length='long': must be of type int",
        ),
        ({"data": {"builtin": "pydoc", "sequence_length": True}}, "must be of type int"),
        ({"data": {"builtin": "pydoc", "sequence_length": 1}}, "must be a number of tokens >= 2"),
        ({"data": {"builtin": "pydoc", "packing": "tight"}}, r"data\.packing='tight'"),
        ({"data": {"builtin": "pydoc", "loss_on": "some"}}, r"data\.loss_on='some'"),
        ({"data": {"builtin": "pydoc", "held_out": 1.0}}, r"data\.held_out=1\.0: must be a share"),
        ({"data": {"builtin": "pydoc", "eval_sequences": 0}}, r"data\.eval_sequences=0"),
        ({"data": {"files": "x", "prompt": "q"}}, "prompt and completion are a pair"),
        ({"data": {"files": "x", "prompt": "q", "completion": "r", "messages": "m"}}, "two forms of chats"),
        ({"data": {"files": "x", "streaming": True}}, "is for a data set of the hub"),
        ({"data": {"hub": "x", "streaming": True}}, r"data\.held_out=0\.05: a stream has no known length"),
        ({"losses": {"kl": 0}}, "all weights are 0"),
        ({"losses": {"kl": -1}}, r"losses\.kl=-1: must be a finite weight >= 0"),
        ({"losses": {"kl": float("inf")}}, r"losses\.kl=inf"),
        ({"losses": {"kl": 1, "temperature": 0}}, r"losses\.temperature=0"),
        ({"losses": {"kl": 1, "logit_chunk": 0}}, r"losses\.logit_chunk=0"),
        ({"losses": {"mixer": 1, "mixer_inputs": "both"}}, r"losses\.mixer_inputs='both'"),
        ({"loss_from": -1}, "loss_from=-1"),
        ({"train": "some"}, "train='some': must be 'new', 'all', or a list"),
        ({"train": []}, r"train=\[\]: must be"),
        ({"train": [1]}, r"train=\[1\]: must be of type str or list\[str\]"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"keep": "first"}, "keep='first'"),
        ({"memory": {"hidden_size": 3}}, r"memory\.hidden_size: not a field that training may change"),
        ({"trainer": [1]}, r"trainer=\[1\]: must be a section"),
        ({"teacher": 3}, "teacher=3: must be of type str or null"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ValueError, match=message):
        build(**values)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 0}, r"lora\.r=0: must be a rank >= 1"),
        ({"dropout": 1.0}, r"lora\.dropout=1\.0: must lie in"),
        ({"rank": 4}, r"lora\.rank: no such setting"),
        ({"target_modules": 3}, r"lora\.target_modules=3"),
        ({"quantize": "int4"}, r"lora\.quantize='int4': must be one of \[None, 'nf4', 'fp4'\]"),
        ({"quantize": "nf4", "merge": True}, r"lora\.merge=True: with lora\.quantize='nf4' .* merge there"),
    ],
)
def test_refused_adapters(lora, message):
    with pytest.raises(ValueError, match=message):
        build(FinetuneSettings, lora=lora)
    with pytest.raises(ValueError, match="with a lora section the adapter trains"):
        build(FinetuneSettings, lora={}, train="new")


def test_an_adapter_alone_cannot_carry_memory_fields():
    with pytest.raises(
        ValueError, match=r"memory=\{'window_size': 8\}: an adapter is loaded onto its source.*merge: true"
    ):
        build(FinetuneSettings, lora={}, memory={"window_size": 8})
    assert build(FinetuneSettings, lora={"merge": True}, memory={"window_size": 8}).memory == {"window_size": 8}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"trainer": {"max_stepz": 3}},
            r"trainer\.max_stepz: TrainingArguments has no such field; did you mean 'max_steps'",
        ),
        ({"trainer": {"seed": 3}}, r"trainer\.seed: is decided elsewhere; set seed"),
        ({"trainer": {"warmup_steps": -1}}, "trainer: "),
        ({"trainer": {"eval_strategy": "steps"}, "data": {"builtin": "pydoc", "held_out": 0}}, "nothing is held out"),
        ({"keep": "best", "trainer": {"eval_strategy": "no"}}, "keep='best': goes by the loss on held-out text"),
        ({"keep": "best", "trainer": {"eval_strategy": "epoch"}}, "trainer: .*match"),
        ({"keep": "best", "trainer": {"save_total_limit": 1}}, r"trainer\.save_total_limit=1: with keep='best'"),
        ({"data": {"hub": "x", "streaming": True, "held_out": 2}}, r"trainer\.max_steps: a stream has no known length"),
    ],
)
def test_refused_trainer_fields(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        training_arguments(build(**values), tmp_path)


def test_arguments_of_a_run(tmp_path):
    settings = build(seed=5, trainer={"gradient_checkpointing": True, "save_steps": 7, "report_to": "none"})
    arguments = training_arguments(settings, tmp_path)
    assert (arguments.seed, arguments.data_seed, arguments.eval_steps) == (5, 5, 7)
    assert arguments.output_dir == str(tmp_path) and arguments.report_to == []
    kwargs = getattr(arguments, "activation_checkpointing_kwargs", None) or arguments.gradient_checkpointing_kwargs
    assert kwargs == {"use_reentrant": False}
    assert getattr(arguments, "activation_checkpointing", False) or arguments.gradient_checkpointing
    assert training_arguments(build(), tmp_path).report_to == ["tensorboard"]
    assert training_arguments(build(FinetuneSettings), tmp_path).learning_rate == 2e-5
    assert training_arguments(build(FinetuneSettings, lora={}), tmp_path).learning_rate == 2e-4
