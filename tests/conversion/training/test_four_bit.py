"""QLoRA without a GPU: what is refused, what transformers and PEFT are asked for, and that nothing is passed over.

4-bit arithmetic itself is bitsandbytes'; `tests/modeling/adapters/test_peft_training.py` has a test of it for
machines with a GPU.
"""

import json
import re
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations import bitsandbytes as integration

from conversion.training import four_bit
from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from tests.conversion.training_setup import log_of, run_finetune, tiny_graft
from tests.oracles import randomize_
from tests.tiny import SIZES


QLORA = {"r": 2, "quantize": "nf4"}


class Params4bit(nn.Parameter):
    """By its name what bitsandbytes' weights are to PEFT."""


class Linear4bit(nn.Linear):
    """bitsandbytes' linear map as far as its signature and its dtypes go."""

    def __init__(self, inputs, outputs, bias, compute_dtype, **options):
        super().__init__(inputs, outputs, bias)
        self.asked = (compute_dtype, options["quant_type"], options["compress_statistics"])
        self.weight.blocksize = 64
        self.support_avx512bf16_for_cpu = True

    def forward(self, x):
        return nn.functional.linear(x.to(torch.bfloat16), self.weight).to(x.dtype)


# Refused -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("package", "gpu", "message"),
    [
        (False, True, r"here bitsandbytes is not installed \(pip install bitsandbytes\); run it on"),
        (True, False, "here there is no CUDA GPU; run it on"),
        (False, False, "is not installed .* and there is no CUDA GPU; run it on"),
    ],
)
def test_refused_where_it_cannot_run(package, gpu, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(four_bit, "is_bitsandbytes_available", lambda: package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    # bf16 asks for a GPU too, in words that do not mention 4 bits.
    assert run_finetune(tmp_path, lora=QLORA, trainer={"bf16": True}) == 2
    told = capsys.readouterr().err
    assert "error: lora.quantize='nf4': a base in 4 bits needs bitsandbytes and a CUDA GPU" in told
    assert re.search(message, told) and "remove lora.quantize" in told
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_without_the_setting_nothing_is_asked_of_the_machine(monkeypatch):
    monkeypatch.setattr(four_bit, "is_bitsandbytes_available", lambda: pytest.fail("asked"))
    for lora in (None, {"r": 2}):
        settings = SimpleNamespace(lora=lora)
        four_bit.check_machine(settings)
        assert four_bit.loading_options(settings) == {}


def test_a_model_that_was_not_loaded_in_4_bits_is_refused():
    with pytest.raises(ValueError, match=r"lora\.quantize: no weight of the model was loaded in 4 bits"):
        four_bit.prepare(BMojoForCausalLM(BMojoConfig(**SIZES)))


# What is built -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_configuration(kind):
    config = four_bit.four_bit_config(kind)
    assert isinstance(config, BitsAndBytesConfig) and config.load_in_4bit and config.bnb_4bit_quant_type == kind
    assert config.bnb_4bit_use_double_quant and config.bnb_4bit_compute_dtype == torch.bfloat16
    assert config.llm_int8_skip_modules == ["lm_head"]


@pytest.mark.parametrize("fields", [{}, {"ssm_type": "mamba"}, {"tie_fading_projections": False}], ids=str)
def test_transformers_replaces_every_projection(fields, monkeypatch):
    """By transformers' own function, which takes nn.Linear alone and would pass over subclasses without a word."""
    monkeypatch.setattr(integration, "bnb", SimpleNamespace(nn=SimpleNamespace(Linear4bit=Linear4bit)), raising=False)
    sizes = {**SIZES, **fields}
    plain = randomize_(BMojoForCausalLM(BMojoConfig(**sizes))).eval()
    quantization = four_bit.four_bit_config("nf4")
    model = BMojoForCausalLM(BMojoConfig(**sizes, quantization_config=quantization)).eval()
    expected = [name for name, module in plain.model.named_modules() if isinstance(module, nn.Linear)]
    integration.replace_with_bnb_linear(model, quantization.llm_int8_skip_modules, quantization)
    found = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert sorted(found) == sorted(f"model.{name}" for name in expected) and len(expected) >= 16
    assert {module.asked for module in found.values()} == {(torch.bfloat16, "nf4", True)}
    assert type(model.lm_head) is nn.Linear


def replaced(monkeypatch, **fields):
    """A model as transformers leaves it before 4-bit weights are loaded."""
    monkeypatch.setattr(integration, "bnb", SimpleNamespace(nn=SimpleNamespace(Linear4bit=Linear4bit)), raising=False)
    quantization = four_bit.four_bit_config("nf4")
    model = BMojoForCausalLM(BMojoConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 128, **fields}))
    return integration.replace_with_bnb_linear(model, quantization.llm_int8_skip_modules, quantization)


def test_maps_that_the_kernel_for_cpus_cannot_pack_do_without_it(monkeypatch, caplog):
    """bitsandbytes packs 32 rows together, in whole blocks of columns, and asserts if that does not come out even."""
    with caplog.at_level("INFO", logger="modeling_bmojo.modeling_bmojo"):
        model = replaced(monkeypatch)
    packed = {
        name: module.support_avx512bf16_for_cpu for name, module in model.named_modules() if hasattr(module, "asked")
    }
    for name, module in model.named_modules():
        if hasattr(module, "asked"):
            assert packed[name] == (module.out_features % 32 == 0 and module.in_features % 64 == 0), name
    unfit = [name for name, fits in packed.items() if not fits]
    assert unfit == ["model.layers.0.fading.in_proj", "model.layers.1.fading.in_proj"] and len(packed) == 18
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == unfit
    s6 = replaced(monkeypatch, ssm_type="mamba")
    unfit = {
        name.rpartition(".")[2]
        for name, module in s6.named_modules()
        if not getattr(module, "support_avx512bf16_for_cpu", True)
    }
    assert unfit == {"x_proj", "dt_proj"}


def test_other_kinds_of_modules_are_left_as_they_are(monkeypatch):
    """An older bitsandbytes has no such kernel; other quantised modules know nothing of it."""
    model = BMojoForCausalLM(BMojoConfig(**SIZES))
    new = nn.Linear(16, 8)
    model.set_submodule("model.layers.0.self_attn.k_proj", new)
    assert model.model.layers[0].self_attn.k_proj is new and not hasattr(new, "support_avx512bf16_for_cpu")


# A run with stand-ins ------------------------------------------------------------------------------------------------
def quantised(model):
    """As bitsandbytes leaves a model, as far as dtypes and names of types go."""
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight = Params4bit(module.weight.detach().to(torch.bfloat16), requires_grad=False)
            module.forward = Linear4bit.forward.__get__(module)
    model.is_loaded_in_4bit = True
    return model


def test_a_run_prepares_the_model_and_writes_an_ordinary_adapter(tmp_path, monkeypatch, capsys):
    asked, prepared = [], []
    load, prepare = BMojoForCausalLM.from_pretrained.__func__, peft.prepare_model_for_kbit_training

    def from_pretrained(cls, *arguments, quantization_config=None, **options):
        asked.append(quantization_config)
        model, info = load(cls, *arguments, **options)
        return quantised(model), info

    def recorded(model, **options):
        prepared.append(options)
        model = prepare(model, **options)
        model.is_loaded_in_4bit = False  # transformers would count parameters with bitsandbytes
        return model

    monkeypatch.setattr(four_bit, "check_machine", lambda settings: None)
    monkeypatch.setattr(BMojoForCausalLM, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(peft, "prepare_model_for_kbit_training", recorded)
    assert run_finetune(tmp_path, lora={**QLORA, "recipe": "hylora"}, trainer={"gradient_checkpointing": True}) == 0
    assert [config.bnb_4bit_quant_type for config in asked] == ["nf4"]
    assert prepared == [{"use_gradient_checkpointing": False}]  # the Trainer switches it on, by its own settings
    losses = log_of(tmp_path / "out")
    assert len(losses) == 4 and losses[-1] < losses[0]
    monkeypatch.undo()

    out = tmp_path / "out"
    tensors = load_file(out / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert any("lora_B" in name and value.abs().sum() > 0 for name, value in tensors.items())
    base = BMojoForCausalLM.from_pretrained(tiny_graft()).eval()
    ids = torch.arange(40)[None] % 90 + 3
    with torch.no_grad():
        before = base(ids).logits.clone()
        adapted = peft.PeftModel.from_pretrained(base, out).eval()
        assert (adapted(input_ids=ids).logits - before).abs().max() > 1e-3
    report = json.loads((out / "graft_report.json").read_text())
    assert report["training"][-1]["settings"]["lora"]["quantize"] == "nf4"
    assert "parameters trained" in capsys.readouterr().out


def test_sharded_launches_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(four_bit, "check_machine", lambda settings: None)
    monkeypatch.setattr(four_bit, "loading_options", lambda settings: {})
    monkeypatch.setattr("conversion.training.student.loading_options", lambda settings: {})
    monkeypatch.setattr("conversion.training.tasks.sharding", lambda arguments: "FSDP")
    assert run_finetune(tmp_path, lora=QLORA) == 2
    assert "lora.quantize='nf4': a base in 4 bits cannot be sharded here; remove it, or launch without FSDP" in (
        capsys.readouterr().err
    )
