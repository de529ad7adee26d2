"""Whole models on other implementations than torch's, and on kernels from the hub."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch

from modeling_bmojo import dispatch_bmojo, kernels_hub
from modeling_bmojo.dispatch_bmojo import (
    TORCH,
    Kernels,
    Situation,
    choose,
)
from tests.modeling.kernels import kernel_stubs
from tests.modeling.kernels.dispatch_cases import (
    cast,
    chosen,
    padded_batch,
    python,
    read_and_decode,
    scan_case,
    tiny_model,
)
from tests.modeling.kernels.dispatch_fixtures import PACKAGES
from tests.modeling.kernels.kernel_stubs import CALLS, DECLARED, LAYERS, install
from tests.tiny import VOCAB, WINDOW


pytestmark = pytest.mark.usefixtures("nothing_remembered")


@pytest.mark.parametrize("innovation", ["output", "state", "key"])
def test_torch_equals_auto_on_the_cpu_exactly(innovation, installed):
    """And with every package installed, no tensor of the CPU reaches any of them."""
    batch = padded_batch()
    auto, forced = (
        read_and_decode(tiny_model(innovation=innovation, kernel_backend=backend), *batch)
        for backend in ("auto", "torch")
    )
    assert torch.equal(auto, forced) and CALLS == []


@pytest.mark.parametrize("innovation", ["output", "state", "key"])
@pytest.mark.parametrize("ssm_type", ["mamba2", "mamba"])
def test_a_model_on_the_packages_equals_a_model_on_torch(innovation, ssm_type, installed, on_gpu):
    """Prefill, a prefill that continues, decoding and pads: the whole path of states through the wrappers."""
    batch, fields = padded_batch(), dict(innovation=innovation, ssm_type=ssm_type)
    wanted = read_and_decode(tiny_model(kernel_backend="torch", **fields), *batch)
    assert CALLS == []
    got = read_and_decode(tiny_model(**fields), *batch)
    other = "selective_scan_fn" if ssm_type == "mamba2" else "mamba_chunk_scan_combined"
    assert set(CALLS) == set(DECLARED) - {other}
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ssm_type", ["mamba2", "mamba"])
def test_a_model_on_triton_equals_a_model_on_torch(ssm_type):
    """In Triton's interpreter, on the CPU; the scan, which has no Triton kernel, stays what it was."""
    batch = padded_batch()
    wanted = read_and_decode(tiny_model(ssm_type=ssm_type), *batch)
    got = read_and_decode(tiny_model(ssm_type=ssm_type, kernel_backend="triton"), *batch)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ssm_type", ["mamba2", "mamba"])
@pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
def test_training_with_a_cache_works_on_every_backend(backend, ssm_type, installed, monkeypatch):
    """The cache moves its states on in place, though the backward pass of the second chunk needs them as they were."""
    if backend == "auto":  # on a GPU with the packages: theirs where they can, torch elsewhere
        monkeypatch.setattr(dispatch_bmojo, "device_type", lambda tensor: "cuda")
        monkeypatch.setattr(dispatch_bmojo, "tf32_allowed", lambda: True)
    model = tiny_model(
        layer_types=["bmojo"] * 4, ssm_type=ssm_type, **({} if ssm_type == "mamba2" else dict(ssm_state_size=3))
    )
    ids, gradients = torch.randint(0, VOCAB, (1, 18)), []
    for setting in ("torch", backend):
        model.config.kernel_backend = setting
        model.zero_grad()
        cache = model(ids[:, :9], use_cache=True).past_key_values
        model(ids[:, 9:], past_key_values=cache).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_triton_is_passed_over_on_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch_bmojo, "unavailable", lambda device: f"{device} is too old")
    assert chosen("expiry") == ["torch"]
    assert choose("expiry", Situation("cuda", torch.float32)).passed["triton"].reason == "cuda is too old"


def test_training_on_the_packages_equals_training_on_torch(installed, on_gpu):
    ids = torch.randint(0, VOCAB, (2, 3 * WINDOW))
    gradients = []
    for backend in ("torch", "auto"):
        model = tiny_model(kernel_backend=backend).train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(CALLS) == {"causal_conv1d_fn", "mamba_chunk_scan_combined"}
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, rtol=1e-3, atol=1e-5, msg=name)


def test_the_scan_of_a_bf16_model_gets_bf16_and_an_fp32_state(installed, on_gpu, monkeypatch):
    """At the model's precision the kernels read half as much; time steps, decays and state stay in fp32."""
    seen = []
    real = kernel_stubs.mamba_chunk_scan_combined

    def spy(x, dt, A, B, C, chunk_size, D=None, **kwargs):
        y, state = real(x, dt, A, B, C, chunk_size, D=D, **kwargs)
        seen.append((x.dtype, dt.dtype, A.dtype, B.dtype, D.dtype, y.dtype, state.dtype))
        return y, state

    monkeypatch.setattr(sys.modules["mamba_ssm.ops.triton.ssd_combined"], "mamba_chunk_scan_combined", spy)
    model = tiny_model(torch.bfloat16)
    with torch.no_grad():
        cache = model(input_ids=torch.randint(0, VOCAB, (1, 9))).past_key_values
    narrow, wide = torch.bfloat16, torch.float32
    assert set(seen) == {(narrow, wide, wide, narrow, wide, narrow, wide)}
    assert cache.layers[0].ssm.dtype == wide


def test_narrow_inputs_are_widened_for_forms_that_need_it():
    """A scan that falls back to torch computes in fp32 whatever its inputs came in."""
    inputs = cast(scan_case(9, 2, True, seed=1)[0], torch.float32)
    narrow = [value.bfloat16() if index in (0, 3, 4) else value for index, value in enumerate(inputs)]
    wide = [value.bfloat16().float() if index in (0, 3, 4) else value for index, value in enumerate(inputs)]
    for got, want in zip(Kernels().run("chunk_scan", *narrow), TORCH["chunk_scan"](*wide)):
        assert torch.equal(got, want)


def test_the_configuration_is_obeyed_at_every_call():
    model = tiny_model()
    ids = torch.arange(9)[None] % VOCAB
    model(input_ids=ids)
    model.config.kernel_backend = "cuda"
    with pytest.raises(ValueError, match="kernel_backend='cuda': cannot run operation 'conv'"):
        model(input_ids=ids)


def test_copies_keep_their_own_setting():
    model = tiny_model()
    other = copy.deepcopy(model)
    other.config.kernel_backend = "torch"
    assert model.model.layers[0].fading.kernels.config.kernel_backend == "auto"
    assert other.model.layers[0].fading.conv.kernels.config is other.config
    restored = pickle.loads(pickle.dumps(model))
    assert restored.model.layers[0].self_attn.kernels.config.kernel_backend == "auto"


@pytest.mark.parametrize("place", ["torch", "cuda", "hub"])
def test_compiles_without_graph_breaks(place, monkeypatch):
    """The choice is a constant to the compiler, also where the form is a wrapper around a function from elsewhere."""
    if place == "cuda":
        install(monkeypatch, *PACKAGES)
        monkeypatch.setattr(sys.modules["causal_conv1d"], "causal_conv1d_fn", traceable_conv)
        monkeypatch.setattr(dispatch_bmojo, "device_type", lambda tensor: "cuda")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    mixer = tiny_model().model.layers[0].fading
    if place == "hub":
        monkeypatch.setattr(kernel_stubs, "causal_conv1d_fn", traceable_conv)
        mixer.kernels.hub = {"conv": kernels_hub.hub_form("conv", LAYERS["causal_conv1d_fn"]())}
        mixer.kernels.hub_device = "cpu"
    compiled = torch.compile(lambda x, h: mixer.conv(mixer.conv(x, h), None), fullgraph=True, backend="eager")
    x, history = torch.randn(2, 9, 40), torch.randn(2, 3, 40)
    for _ in range(3):
        torch.testing.assert_close(compiled(x, history), mixer.conv(mixer.conv(x, history), None), rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    if place == "torch":
        step = torch.compile(mixer._scan, fullgraph=True, backend="eager")
        mixed, keys, dt = torch.randn(2, 9, 16), torch.randn(2, 9, 24), torch.randn(2, 9, 4)
        arguments = (mixed, keys, dt, torch.tensor([9, 5]), None, False)
        torch.testing.assert_close(step(*arguments), mixer._scan(*arguments))
    torch._dynamo.reset()


def traceable_conv(x, weight, bias=None, initial_states=None, activation=None):
    """`causal_conv1d_fn` without the stub's checks, which a compiler cannot trace."""
    start = torch.zeros_like(x[:, :, : weight.shape[1] - 1]) if initial_states is None else initial_states
    return torch.nn.functional.conv1d(torch.cat([start, x], 2), weight[:, None], bias, groups=weight.shape[0])


# The hub -------------------------------------------------------------------------------------------------------------
def test_without_kernels_asking_for_them_is_transformers_error():
    model = tiny_model()
    with pytest.raises(ValueError, match="Kernels are not available"):
        model.set_use_kernels(True)
    assert "_kernel_funcs" not in model.__dict__
    model.set_use_kernels(False)
    assert model.model.layers[0].fading.kernels.hub is None


HUB = """
import sys, torch
import kernels
from tests.modeling.kernels.kernel_stubs import CALLS, LAYERS
from tests.tiny import MIXED_LAYERS, SIZES, VOCAB
from modeling_bmojo import BMojoConfig, BMojoForCausalLM, dispatch_bmojo, explain_kernels
from transformers import AutoModelForCausalLM
from transformers.models.mamba2 import modeling_mamba2

class Local:
    def __init__(self, layer):
        self.layer = layer
    def load(self):
        return self.layer

def mixers(model):
    return [layer.fading for layer in model.model.layers if hasattr(layer, "fading")]

torch.manual_seed(0)
BMojoForCausalLM(BMojoConfig(**SIZES | MIXED_LAYERS)).save_pretrained(sys.argv[1])
load = AutoModelForCausalLM.from_pretrained
ids = torch.randint(0, VOCAB, (2, 11))

def read(model):
    with torch.no_grad():
        first = model(input_ids=ids)
        return first.logits, model(input_ids=ids[:, :1], past_key_values=first.past_key_values).logits

plain = load(sys.argv[1])
wanted = read(plain)
nowhere = load(sys.argv[1], use_kernels=True)  # transformers' mapping has kernels for GPUs only
assert mixers(nowhere)[0].kernels.hub == {}, mixers(nowhere)[0].kernels.hub
assert all(torch.equal(a, b) for a, b in zip(read(nowhere), wanted)) and CALLS == []

kernels.register_kernel_mapping({name: {"cpu": Local(layer)} for name, layer in LAYERS.items()})
model = load(sys.argv[1], use_kernels=True)
assert set(mixers(model)[0].kernels.hub) == {"conv", "conv_step", "chunk_scan", "scan_step", "s6_scan", "s6_step"}
assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(read(model), wanted))
assert set(CALLS) == {"causal_conv1d_fn", "causal_conv1d_update", "selective_state_update"}, CALLS  # fp32: no TF32
CALLS.clear()
dispatch_bmojo.forget()
dispatch_bmojo.tf32_allowed = lambda: True
assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(read(model), wanted))
assert "mamba_chunk_scan_combined" in CALLS
rows = {row.operation: row for row in explain_kernels(model)}
assert rows["conv"].inference == "hub: causal_conv1d_fn", rows["conv"]
assert rows["conv_step"].training == "torch: ssm_ops.causal_conv", rows["conv_step"]
assert rows["expiry"].inference.startswith("torch")

CALLS.clear()
model.train()
model(input_ids=ids, labels=ids).loss.backward()
assert set(CALLS) == {"causal_conv1d_fn", "mamba_chunk_scan_combined"}, CALLS
model.eval()

CALLS.clear()  # another model, and transformers' own, are as they were
assert all(torch.equal(a, b) for a, b in zip(read(plain), wanted)) and CALLS == []
own = modeling_mamba2.causal_conv1d_fn
assert own.forward.__func__ is type(own).forward
model.config.kernel_backend = "hub"
read(model)
assert set(CALLS) == {"causal_conv1d_fn", "causal_conv1d_update", "mamba_chunk_scan_combined", "selective_state_update"}
plain.config.kernel_backend = "hub"
try:
    read(plain)
except ValueError as error:
    assert "hub kernels were not asked for; load with from_pretrained(..., use_kernels=True)" in str(error), error
else:
    raise AssertionError("a forced backend that nobody loaded must be an error")
model.config.kernel_backend = "auto"
model.set_use_kernels(False)
CALLS.clear()
assert all(torch.equal(a, b) for a, b in zip(read(model), wanted)) and CALLS == []
print("as it should")
"""


def test_use_kernels_reaches_the_operations(tmp_path):
    """`from_pretrained(..., use_kernels=True)`, the package `kernels` stood in for, with repositories for the CPU."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text((Path(__file__).parent / "stub_kernels.py").read_text())
    (tmp_path / "kernels-0.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    (tmp_path / "kernels-0.dist-info" / "METADATA").write_text(metadata)
    code = f"import sys; sys.argv = ['hub', {str(tmp_path / 'model')!r}]\n{HUB}"
    assert python(code, tmp_path).stdout.strip().endswith("as it should")
