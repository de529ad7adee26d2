"""Adapters at work: gradients on every kernel path, merging, saving, switching, generating, k-bit preparation."""

import copy
import importlib.util

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM, bmojo_lora_config, dispatch_bmojo
from tests.modeling.kernels.kernel_stubs import CALLS, install
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, UNPROJECTED, VOCAB, WINDOW


LONG = 3 * WINDOW
MODELS = {
    "mamba2": {},
    "s6": dict(ssm_type="mamba"),
    "delta": dict(ssm_type="gated_delta"),
    "kalma": dict(ssm_type="kalmanet", ssm_solver_steps=5),
    "mixed": MIXED_LAYERS,
    "unprojected": UNPROJECTED,
    "untied": dict(tie_fading_projections=False),
}
RECIPES = {
    "lora": dict(),
    "hylora": dict(recipe="hylora", ssm_scalars=True),
    "dora": dict(use_dora=True),
    "rslora": dict(use_rslora=True),
}


def build(name="mamba2", dtype=torch.float32, **fields) -> BMojoForCausalLM:
    torch.manual_seed(0)
    config = BMojoConfig(**{**SIZES, "pad_token_id": 0, **MODELS[name], **fields})
    return randomize_(BMojoForCausalLM(config).to(dtype)).eval()


def moved(wrapped, seed=1):
    """As after some training: nothing that an adapter holds is what it started as."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return wrapped


def adapted(model, name="default", seed=1, **options):
    options = {"r": 2, **options}
    return moved(get_peft_model(model, bmojo_lora_config(model, **options), adapter_name=name), seed)


def tokens(count=LONG, batch=2, seed=1):
    return torch.randint(1, VOCAB, (batch, count), generator=torch.Generator().manual_seed(seed))


def logits(model, ids=None, **options):
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids, **options).logits


def gradients(model) -> dict[str, torch.Tensor]:
    ids = tokens()
    model.train().zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


# Gradients -----------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["torch", "triton", "cuda"])
def backend(request, monkeypatch):
    """Every kernel path that runs without a GPU: Triton by interpretation, the CUDA packages by stand-ins."""
    dispatch_bmojo.forget()
    monkeypatch.delenv(dispatch_bmojo.ENVIRONMENT, raising=False)
    if request.param == "cuda":
        install(monkeypatch, "causal_conv1d", "mamba_ssm")
        monkeypatch.setattr(dispatch_bmojo, "device_type", lambda tensor: "cuda")
    CALLS.clear()
    yield request.param
    dispatch_bmojo.forget()


@pytest.mark.parametrize("name", ["mamba2", "s6", "mixed", "unprojected"])
def test_every_adapted_projection_gets_its_gradient_on_every_kernel_path(name, backend):
    """Also out_proj: a kernel that reads a weight past its module would leave the adapter without one."""
    sizes = dict(ssm_conv_kernel=4, ssm_chunk_size=16, tie_fading_projections=name != "mixed", kernel_backend="torch")
    if name in ("mamba2", "mixed"):  # such as the CUDA kernels take
        sizes |= dict(ssm_num_heads=4, ssm_head_dim=4, ssm_state_size=8, ssm_num_groups=2)
    model = adapted(build(name, **sizes), recipe="hylora", ssm_scalars=True)
    plain = gradients(model)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in plain.values())
    assert CALLS == []
    model.config.kernel_backend = backend
    for module in model.modules():  # modules trained in full are copies, with a copy of the configuration
        if hasattr(module, "kernels"):
            module.kernels.config.kernel_backend = backend
    assert_same(gradients(model), plain, rtol=2e-4, atol=2e-5)
    scan = "selective_scan_fn" if name == "s6" else "mamba_chunk_scan_combined"
    assert set(CALLS) == ({"causal_conv1d_fn", scan} if backend == "cuda" else set())


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_low_rank_product(name):
    """With G the gradient of a merged weight W + s B A: dB = s G A^T and dA = s B^T G."""
    model = adapted(build(name, torch.float64), lora_alpha=3)
    found = gradients(model)
    merged = copy.deepcopy(model).merge_and_unload()
    merged.requires_grad_(True)
    whole = gradients(merged)
    factors = dict(model.named_parameters())
    names = [key for key in found if ".lora_A." in key]
    assert names
    for key in names:
        other = key.replace("lora_A", "lora_B")
        weight = key.removeprefix("base_model.model.").partition(".lora_A")[0] + ".weight"
        scale, A, B = 3 / 2, factors[key].detach().double(), factors[other].detach().double()
        torch.testing.assert_close(found[other].double(), scale * whole[weight] @ A.T, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[key].double(), scale * B.T @ whole[weight], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradient_checkpointing_changes_no_gradient(recipe, reentrant):
    model = adapted(build("mixed"), **RECIPES[recipe])
    plain = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.get_base_model().model.gradient_checkpointing
    found = gradients(model)
    assert_same(found, plain, rtol=0, atol=1e-6)


# Merging, saving, switching ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_merging_and_unmerging_compute_the_same(recipe, name, dtype, tolerance):
    base = build(name, dtype)
    before = logits(base)
    model = adapted(base, **RECIPES[recipe]).to(dtype)
    expected = logits(model)
    assert (expected - before).abs().max() > 0.01
    tolerance = tolerance * float(expected.abs().max())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=tolerance)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=tolerance)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, rtol=0, atol=tolerance)
    merged = model.merge_and_unload()
    assert type(merged) is BMojoForCausalLM
    assert not [key for key in merged.state_dict() if "lora" in key or "modules_to_save" in key]
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=tolerance)


def test_a_merged_model_is_saved_as_a_plain_one(tmp_path):
    model = adapted(build("mixed"), recipe="hylora", ssm_scalars=True).merge_and_unload()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(BMojoForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_saved_adapters_load_exactly_with_convolutions_and_scalars(name, dtype, tmp_path):
    build(name).save_pretrained(tmp_path / "base")
    load = lambda: BMojoForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype).eval()  # noqa: E731
    model = adapted(load(), recipe="hylora", ssm_scalars=True)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    held = [key for key in ours if "lora_" in key or "modules_to_save" in key]
    assert {"conv.modules_to_save", "scalars.modules_to_save"} <= {
        part for key in held for part in ("conv.modules_to_save", "scalars.modules_to_save") if part in key
    }
    for key in held:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key
        assert ".scalars." not in key or theirs[key].dtype == torch.float32


def test_adapters_switch():
    base = build("mixed")
    alone = {"base": logits(base)}
    recipes = {"first": dict(recipe="hylora", ssm_scalars=True), "second": dict(), "third": dict(recipe="hylora")}
    for seed, (name, options) in enumerate(recipes.items()):
        alone[name] = logits(adapted(build("mixed"), name, seed, **options))
    model = get_peft_model(base, bmojo_lora_config(base, r=2, **recipes["first"]), adapter_name="first")
    for name in ("second", "third"):
        model.add_adapter(name, bmojo_lora_config(model, r=2, **recipes[name]))
    for seed, name in enumerate(recipes):
        source = adapted(build("mixed"), name, seed, **recipes[name]).state_dict()
        model.load_state_dict({key: value for key, value in source.items() if f".{name}." in key}, strict=False)
    for name in ("second", "first", "third", "second"):
        model.set_adapter(name)
        assert torch.equal(logits(model), alone[name]), name
        with model.disable_adapter():
            assert torch.equal(logits(model), alone["base"])
    assert len({float(value.sum()) for value in alone.values()}) == 4


# Generating ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["hylora", "dora"])
def test_generation_on_a_live_cache_is_the_uncached_computation(recipe, name):
    model = adapted(build(name, torch.float64), **RECIPES[recipe]).double()
    ids = tokens()
    cache = BMojoCache(model.config)
    parts = [logits(model, part, past_key_values=cache) for part in (ids[:, :7], ids[:, 7:8], ids[:, 8:])]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, ids, use_cache=False), rtol=0, atol=1e-9)

    document = model(input_ids=ids).past_key_values
    question = torch.cat([ids, tokens(3, seed=2)], dim=1)
    found = model.generate(
        input_ids=question,
        past_key_values=copy.deepcopy(document),
        max_new_tokens=2 * WINDOW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = logits(model, found.sequences, use_cache=False)[:, question.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits, 1).double(), whole, rtol=0, atol=1e-6)
    assert torch.equal(found.sequences[:, question.shape[1] :], whole.argmax(-1))
    with model.disable_adapter():
        plain = model.generate(input_ids=question, max_new_tokens=2 * WINDOW, do_sample=False)
    assert torch.equal(plain, build(name, torch.float64).generate(question, max_new_tokens=2 * WINDOW, do_sample=False))


def test_a_memory_read_without_the_adapter_may_be_read_on_with_it():
    model = adapted(build())
    with model.disable_adapter():
        cache = model(input_ids=tokens()).past_key_values
    assert logits(model, tokens(2, seed=3), past_key_values=cache).isfinite().all()


# k-bit ---------------------------------------------------------------------------------------------------------------
class Params4bit(nn.Parameter):
    """By its name what bitsandbytes' weights are to PEFT: left alone by the preparation."""


class Linear4bit(nn.Linear):
    """bitsandbytes' linear map as far as dtypes go: computes in bf16, answers in the dtype it was asked in."""

    def forward(self, x):
        return nn.functional.linear(x.to(torch.bfloat16), self.weight).to(x.dtype)


def prepared(name, **options):
    """A model as `prepare_model_for_kbit_training` leaves it: bf16 projections, everything else cast to fp32."""
    model = build(name).to(torch.bfloat16)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight = Params4bit(module.weight.detach(), requires_grad=False)
            module.forward = Linear4bit.forward.__get__(module)
    model.is_loaded_in_4bit = True
    return prepare_model_for_kbit_training(model, **options)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", ["s6", "mixed", "unprojected"])
def test_kbit_preparation_keeps_working(name, autocast, checkpointing):
    model = prepared(name, use_gradient_checkpointing=checkpointing)
    dtypes = {key: value.dtype for key, value in model.named_parameters()}
    assert {dtype for key, dtype in dtypes.items() if key.endswith("_proj.weight")} == {torch.bfloat16}
    assert {dtype for key, dtype in dtypes.items() if "_proj" not in key} == {torch.float32}
    model = adapted(model, recipe="hylora", ssm_scalars=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gradients(model)
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in found.values())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model.eval().generate(input_ids=tokens(), max_new_tokens=WINDOW, do_sample=False)
    assert out.shape == (2, LONG + WINDOW)


if importlib.util.find_spec("bitsandbytes") and torch.cuda.is_available():

    def test_four_bit_weights(tmp_path):
        """QLoRA itself. Collected only where bitsandbytes and a GPU exist."""
        from transformers import BitsAndBytesConfig

        sizes = dict(hidden_size=64, intermediate_size=128, ssm_state_size=16)
        build(**sizes).save_pretrained(tmp_path)
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head"]
        )
        model = BMojoForCausalLM.from_pretrained(tmp_path, quantization_config=four_bit, device_map="cuda")
        model = adapted(prepare_model_for_kbit_training(model), recipe="hylora", ssm_scalars=True).train()
        ids = tokens().cuda()
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
        assert model.eval().generate(input_ids=ids, max_new_tokens=4).shape == (2, LONG + 4)
