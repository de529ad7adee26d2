"""Weights in 8 and 4 bits by torchao, bitsandbytes and optimum-quanto: a model of its dequantised weights.

`make test-quantised` runs this where the three packages are installed: transformers, accelerate and PEFT take other
ways once they are, and all other tests run without.
"""

import copy
import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from optimum import quanto
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from modeling_bmojo import CACHE_NAME, BMojoCache, BMojoConfig, BMojoForCausalLM, linear_bmojo
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES


FORMATS = {
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "quanto int8": lambda: QuantoConfig(weights="int8"),
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
}
SAVED = ["torchao int8", "bitsandbytes int8", "bitsandbytes nf4"]  # quanto's are not written by transformers
WEIGHT_ONLY = ["torchao int8", "quanto int8", "bitsandbytes nf4"]  # int8 of bitsandbytes rounds what goes in as well
WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 128}  # whole blocks of 64 numbers
MODELS = {
    "mamba2": {},
    "s6": {"ssm_type": "mamba"},
    "mixed": MIXED_LAYERS,
    "storage": {"storage_size": 8, "storage_sketch_size": 4, "max_rope_distance": 64},
    "tied head": {"tie_word_embeddings": True},
}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
NEAR = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, fields in MODELS.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp("plain")
        randomize_(BMojoForCausalLM(BMojoConfig(**{**WIDE, **fields}))).float().save_pretrained(found[name])
    return found


def load(folder, kind=None, dtype=torch.float32):
    options = {} if kind is None else {"quantization_config": FORMATS[kind](), "device_map": "cpu"}
    return BMojoForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def tokens(rows=2, count=40):
    return torch.randint(1, 61, (rows, count), generator=torch.Generator().manual_seed(5))


def linear_maps(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def is_converted(module):
    return type(module) is not nn.Linear or type(module.weight) is not nn.Parameter


def dequantised(module):
    """The numbers that a converted map stands for."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        return dequantize_4bit(weight.data, weight.quant_state).float()
    if hasattr(weight, "CB"):  # they move from the weight to the module's state at the first call
        holder = module.state if weight.CB is None else weight
        return holder.CB.float() * holder.SCB[:, None] / 127
    return weight.dequantize().detach().float()


def plain_twin(quantised, folder):
    """The model of the folder with those numbers for its weights."""
    twin, maps = load(folder), linear_maps(quantised)
    with torch.no_grad():
        for name, module in linear_maps(twin).items():
            if is_converted(maps[name]):
                module.weight.copy_(dequantised(maps[name]))
    return twin


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_map_inside_layers_is_converted_and_nothing_else(kind, name, folders):
    """Convolutions, the SSM's scalars, norms, embeddings, sketches and the head stay as they were, by themselves."""
    model, before = load(folders[name], kind), load(folders[name])
    found = {key for key, module in linear_maps(model).items() if is_converted(module)}
    assert found == linear_maps(before).keys() - {"lm_head"} and len(found) >= 18
    tensors = dict(model.named_buffers()) | dict(model.named_parameters(remove_duplicate=False))
    for key, value in before.state_dict().items():
        if key.removesuffix(".weight") in found:
            weight = dequantised(linear_maps(model)[key.removesuffix(".weight")])
            assert 0 < (weight - value).norm() / value.norm() < (0.2 if "nf4" in kind else 0.02), key
        else:
            assert torch.equal(tensors[key], value) and tensors[key].dtype == value.dtype == torch.float32, key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", WEIGHT_ONLY)
@torch.no_grad()
def test_it_reads_and_writes_as_its_dequantised_weights(kind, name, folders):
    model = load(folders[name], kind)
    for module in model.modules():  # a kernel of bitsandbytes' for some CPUs rounds what goes in to bfloat16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    twin, ids = plain_twin(model, folders[name]), tokens()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    expected = twin(ids, attention_mask=mask).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, **NEAR)
    cache = BMojoCache(model.config)
    parts = [model(part, **{CACHE_NAME: cache}).logits for part in ids.split([17, 1, 1, 21], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), twin(ids).logits, **NEAR)
    written = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(written, twin.generate(ids, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in ("mamba2", "s6", "mixed")),
        ("mamba2", torch.bfloat16),
        ("mamba2", torch.half),
    ],
)
@torch.no_grad()
def test_compiled_steps_read_eight_bits_as_they_are(name, dtype, folders):
    """Every map of torchao's is written out as sums over its dequantised numbers; the programs stay one per kind."""
    model, ids, programs = load(folders[name], "torchao int8", dtype=dtype), tokens(rows=1), []

    def backend(program, inputs):
        products = (nn.functional.linear, torch.matmul)
        programs.append({node.name for node in program.graph.nodes if node.target in products})
        return program

    cache = BMojoCache(model.config)
    model(ids[:, :20], **{CACHE_NAME: cache})
    states = copy.deepcopy(cache)
    plain = [model(token, **{CACHE_NAME: cache}).logits for token in ids[:, 20:].split(1, dim=1)]
    torch.compiler.reset()
    model.compile_regions(backend=backend, fullgraph=True)
    found = [model(token, **{CACHE_NAME: states}).logits for token in ids[:, 20:].split(1, dim=1)]
    tight = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0, atol=0.05 * float(plain[0].std()))
    torch.testing.assert_close(torch.cat(found), torch.cat(plain), **tight)
    kinds = set(model.config.layer_types)
    assert len(kinds) < len(programs) <= len(kinds) + 1 + ("full_attention" in kinds)  # once more for any size
    assert set().union(*programs) <= {"dt"}  # that map of S6 is no module's call
    torch.compiler.reset()


@torch.no_grad()
def test_weights_that_round_or_scale_what_goes_in_are_called(monkeypatch):
    linear = nn.Linear(64, 32, bias=True)
    for kind, known in ((Int8WeightOnlyConfig(), True), (Int8DynamicActivationInt8WeightConfig(), False)):
        model = nn.Sequential(copy.deepcopy(linear))
        quantize_(model, kind)
        x = torch.randn(1, 1, 64)
        expected = model(x)
        assert linear_bmojo.is_dequantised(model[0].weight) == known
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            found = linear_bmojo.project(model[0], x)
        torch.testing.assert_close(found, expected, rtol=1e-5 * known, atol=1e-5 * known)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_int8_of_bitsandbytes_stays_near_its_dequantised_weights(name, folders):
    """What it rounds depends on all tokens of a call: read in other parts, a text has slightly other numbers."""
    model = load(folders[name], "bitsandbytes int8")
    twin, ids = plain_twin(model, folders[name]), tokens()
    found, expected = model(ids).logits, twin(ids).logits
    assert (found - expected).norm() / expected.norm() < 0.2
    assert model.generate(ids, **GREEDY).shape == (2, 48)


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_a_prefix_and_a_storage_know_the_weights(kind, folders, tmp_path):
    model, ids = load(folders["storage"], kind), tokens(rows=1)
    prefixes = model.prefix_memory(tmp_path / "prefixes")
    prefixes.read(ids[:, :30])
    again = load(folders["storage"], kind)
    found = again.generate(ids, prefix_memory=again.prefix_memory(tmp_path / "prefixes"), **GREEDY)
    assert torch.equal(found, model.generate(ids, **GREEDY))
    with pytest.raises(ValueError, match="other weights"):
        load(folders["storage"]).prefix_memory(tmp_path / "prefixes")
    cache = BMojoCache(model.config, storage=tmp_path / "book")
    with torch.no_grad():
        model(ids[:, :30], **{CACHE_NAME: cache})
        cache.sync()
        cache.close()
        opened = BMojoCache(again.config, storage=tmp_path / "book")
        logits = again(ids[:, 30:], **{CACHE_NAME: opened}).logits
        torch.testing.assert_close(logits, model(ids).logits[:, 30:], **NEAR)
        opened.close()


@pytest.mark.parametrize("kind", SAVED)
@torch.no_grad()
def test_a_converted_folder_loads_again(kind, folders, tmp_path):
    model, ids = load(folders["mamba2"], kind), tokens()
    model.save_pretrained(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    again = BMojoForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["torchao", "quanto"])
@torch.no_grad()
def test_a_model_in_memory_is_converted_by_hand(kind, folders):
    """The head too, unless it is left out: these functions take every nn.Linear."""
    model, ids = load(folders["mamba2"]), tokens()
    if kind == "torchao":
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Linear))
    else:
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
    assert all(map(is_converted, linear_maps(model).values()))
    torch.testing.assert_close(model(ids).logits, plain_twin(model, folders["mamba2"])(ids).logits, **NEAR)
    assert model.generate(ids, **GREEDY).shape == (2, 48)
