"""Folders that travel: any class of ours, saved by a plain `save_pretrained`, where the package is not installed."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_bmojo import AUTO_CLASSES, BMojoConfig, BMojoForCausalLM
from tests.conversion.graft_sources import tiny_tokenizer
from tests.oracles import randomize_
from tests.strangers import run_stranger
from tests.tiny import MIXED_LAYERS, SIZES


CLASSES = {"AutoConfig": "configuration_bmojo.BMojoConfig"} | {
    auto.__name__: f"modeling_bmojo.{cls.__name__}" for auto, cls in AUTO_CLASSES.items()
}


def build(cls=BMojoForCausalLM, **fields):
    return randomize_(cls(BMojoConfig(**{**SIZES, **MIXED_LAYERS, "pad_token_id": 0, **fields}))).eval()


def auto_map(folder):
    return json.loads((folder / "config.json").read_text()).get("auto_map")


def code(folder):
    return {file.name for file in folder.glob("*.py")}


# auto_map ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", AUTO_CLASSES.values(), ids=lambda cls: cls.__name__)
def test_every_save_names_every_class(cls, tmp_path):
    model = build(cls)
    for name in ("first", "again"):
        model.save_pretrained(tmp_path / name)
        assert auto_map(tmp_path / name) == CLASSES
        assert {"modeling_bmojo.py", "configuration_bmojo.py"} <= code(tmp_path / name)
        model = cls.from_pretrained(tmp_path / name)


def test_a_merged_adapter_names_every_class(tmp_path):
    get_peft_model(build(), LoraConfig(target_modules=["q_proj"])).merge_and_unload().save_pretrained(tmp_path)
    assert auto_map(tmp_path) == CLASSES


def test_a_config_alone_names_the_config_alone(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "model")
    for config in (model.config, AutoConfig.from_pretrained(tmp_path / "model"), BMojoConfig(**SIZES)):
        shutil.rmtree(tmp_path / "config", ignore_errors=True)
        config.save_pretrained(tmp_path / "config")
        assert auto_map(tmp_path / "config") == {"AutoConfig": "configuration_bmojo.BMojoConfig"}
        assert "configuration_bmojo.py" in code(tmp_path / "config")
        assert "modeling_bmojo.py" not in code(tmp_path / "config")
    config.save_pretrained(tmp_path / "model")  # beside a model's code it names the model's classes
    assert auto_map(tmp_path / "model") == CLASSES


def test_entries_of_others_stay_while_their_code_is_there(tmp_path):
    """A tokenizer with code of its own, code in a repository on the Hub, and what an old folder of ours named."""
    model, folder = build(), tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenization_own.py").write_text("")
    model.config.auto_map = {
        "AutoTokenizer": ["tokenization_own.Own", None],
        "AutoProcessor": "processing_gone.Gone",
        "AutoModelForMaskedLM": "user/repo--modeling_other.Other",
        "AutoModelForCausalLM": "user/repo--modeling_bmojo.BMojoForCausalLM",
    }
    model.save_pretrained(folder)
    assert auto_map(folder) == CLASSES | {
        "AutoTokenizer": ["tokenization_own.Own", None],
        "AutoModelForMaskedLM": "user/repo--modeling_other.Other",
    }


# Without the package -------------------------------------------------------------------------------------------------
USE_IT = """
import json, tempfile
import transformers
from pathlib import Path
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification,
    AutoModelForTokenClassification, AutoTokenizer, Trainer, TrainingArguments,
)
folder, work = Path(sys.argv[1]), Path(sys.argv[2])

if sys.getfilesystemencoding() == "utf-8":  # tokenizers opens no other names
    tokenizer = AutoTokenizer.from_pretrained(folder)  # before any code is trusted
    assert tokenizer("a b")["input_ids"] == [6, 7], tokenizer("a b")
from transformers.configuration_utils import PreTrainedConfig
assert PreTrainedConfig.from_pretrained(folder).hidden_size == 16
assert not hasattr(transformers, "BMojoForCausalLM")

# As transformers serve loads it: after the configuration, by an attribute of transformers.
from transformers.cli.serving.model_manager import ModelManager
served = ModelManager(device="cpu", trust_remote_code=True)._load_model(f"{folder}@main")
assert type(served).__name__ == "BMojoForCausalLM", type(served)
options = dict(max_new_tokens=3, do_sample=False, generation_config=served.generation_config)
told = served.generate(torch.arange(1, 9)[None], tokenizer=object(), **options)  # as it calls generate()
assert torch.equal(told, served.generate(torch.arange(1, 9)[None], **options))

y = torch.arange(1, 41).view(2, 20)
args = TrainingArguments(str(work / "run"), use_cpu=True, report_to="none", label_smoothing_factor=0.1)
autos = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification,
         AutoModelForQuestionAnswering)
found = {}
for auto in autos:
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    trainer = Trainer(model, args, train_dataset=[0])
    trainer._set_signature_columns_if_needed()
    assert {"seq_idx", "cu_seq_lens_q", "position_ids"} <= set(trainer._signature_columns) or "ForCausal" in str(auto)
    assert not any("scalars" in name for name in trainer.get_decay_parameter_names(model))
    found[auto.__name__] = [type(model).__name__, trainer.model_accepts_loss_kwargs]
    model.save_pretrained(work / auto.__name__)
    with torch.no_grad():
        if auto is AutoModelForCausalLM:
            found["logits"] = model(input_ids=y).logits.sum().item()
            found["loss"] = trainer.compute_loss(model, {"input_ids": y, "labels": y.clone()}).item()
            by_name = transformers.BMojoForCausalLM.from_pretrained(folder, trust_remote_code=True)
            assert type(by_name) is type(model)
        else:
            model(input_ids=y)
model.config.save_pretrained(work / "config")
print("\\n" + json.dumps(found))
"""


@pytest.fixture
def folder(tmp_path):
    """A causal model saved as any model is, with a tokenizer whose files name no class."""
    folder = tmp_path / "modèle-ß-模型"
    build().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "environment", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["utf-8", "C"]
)
def test_a_folder_is_all_there(environment, folder, tmp_path):
    """In a folder whose name has letters outside ASCII, and where the process takes file names for ASCII."""
    found = json.loads(run_stranger(USE_IT, tmp_path, folder, tmp_path / "out", **environment).splitlines()[-1])
    for auto, cls in AUTO_CLASSES.items():
        accepts = cls.__name__ not in ("BMojoForSequenceClassification", "BMojoForQuestionAnswering")
        assert found[auto.__name__] == [cls.__name__, accepts]
        saved = tmp_path / "out" / auto.__name__
        assert auto_map(saved) == CLASSES and {"modeling_bmojo.py", "configuration_bmojo.py"} <= code(saved)
    assert auto_map(tmp_path / "out" / "config") == {"AutoConfig": "configuration_bmojo.BMojoConfig"}
    y = torch.arange(1, 41).view(2, 20)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "AutoModelForCausalLM")
    with torch.no_grad():
        logits = model(input_ids=y).logits
        logs = logits[:, :-1].log_softmax(-1)
        loss = -(0.9 * logs.gather(-1, y[:, 1:, None]).mean() + 0.1 * logs.mean())
    assert found["logits"] == pytest.approx(logits.sum().item(), rel=1e-4)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
