"""Projections: `nn.Linear` itself, found by tools of others; the same numbers, by products that suit a CPU."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM, BMojoForSequenceClassification, onednn_bmojo
from modeling_bmojo.linear_bmojo import parts_for, project
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, UNPROJECTED


pytestmark = pytest.mark.own_settings


SETTINGS = {"mixed": MIXED_LAYERS, "unprojected": UNPROJECTED, "s6": {"ssm_type": "mamba"}}
SETTINGS["delta"] = {"ssm_type": "gated_delta"}
SETTINGS["kalma"] = {"ssm_type": "kalmanet", "ssm_solver_steps": 5}


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def products(monkeypatch):
    """How often the product was cut into parts."""
    calls, real = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args, **options: calls.append(args) or real(*args, **options))
    return calls


@pytest.fixture
def onednn(monkeypatch):
    """How often oneDNN was called; however small a product is, it is worth a call."""
    calls, real = [], onednn_bmojo._linear
    if real is None:
        pytest.skip("this torch has no MKL, whose products oneDNN's replace")

    def record(*args):
        assert args[1].is_contiguous() or args[1].mT.is_contiguous(), "oneDNN takes very long for such a weight"
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(onednn_bmojo, "WORTH", 1)
    monkeypatch.setattr(onednn_bmojo, "WORTH_WITH_GRADIENT", 1)
    monkeypatch.setattr(onednn_bmojo, "_linear", record)
    return calls


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1), (1,), ()])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_one_row_is_cut_and_equal(two_threads, products, onednn, shape, bias):
    linear, x = nn.Linear(24, 30, bias=bias), torch.randn(*shape, 24)
    torch.testing.assert_close(project(linear, x), linear(x), rtol=1e-6, atol=1e-6)
    assert project(linear, x).shape == linear(x).shape and len(products) == 2 and onednn == []


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (3, 2), (9,)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_several_rows_are_onednn_s_and_equal(onednn, shape, bias):
    linear, x = nn.Linear(24, 30, bias=bias), torch.randn(*shape, 48)[..., ::2]
    torch.testing.assert_close(project(linear, x), linear(x), rtol=1e-6, atol=1e-6)
    assert project(linear, x).shape == linear(x).shape and len(onednn) == 2


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 10), st.integers(1, 5), st.booleans(), st.booleans())
def test_any_size_equals_a_plain_linear(size_in, size_out, rows, threads, bias, worth):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        linear, x = nn.Linear(size_in, size_out, bias=bias), torch.randn(1, rows, size_in)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(onednn_bmojo, "WORTH", 1 if worth else onednn_bmojo.WORTH)
            torch.testing.assert_close(project(linear, x), linear(x), rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", ["x weight bias", "x weight", "x", "weight", "bias", "weight bias"])
@pytest.mark.parametrize("rows", [1, 5])
def test_gradients_are_those_of_the_plain_product(two_threads, products, onednn, wanted, rows):
    linear, x = nn.Linear(24, 30, bias="bias" in wanted), torch.randn(2, rows, 24, requires_grad="x" in wanted)
    linear.weight.requires_grad_("weight" in wanted)
    leaves = [x if name == "x" else getattr(linear, name) for name in wanted.split()]
    ours, theirs = (
        torch.autograd.grad(form(x).square().sum(), leaves) for form in (lambda x: project(linear, x), linear)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert products == [] and len(onednn) == 1 + ("x" in wanted) + ("weight" in wanted)


@pytest.mark.parametrize("reduce", ["sum", "first half", "every second", "transposed"])
def test_incoming_gradients_of_any_strides(reduce, onednn):
    linear, x = nn.Linear(24, 30), torch.randn(2, 5, 24, requires_grad=True)
    parts = {
        "sum": lambda y: y,
        "first half": lambda y: torch.cat([y, y.detach()], dim=-1),
        "every second": lambda y: torch.stack([y, y.detach()], dim=-1),
        "transposed": lambda y: y.transpose(0, 2) @ torch.ones(2, 3),
    }
    ours, theirs = (
        torch.autograd.grad(parts[reduce](form(x)).sum(), [x, linear.weight, linear.bias])
        for form in (lambda x: project(linear, x), linear)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(onednn) == 3 and ours[1].is_contiguous()


@pytest.mark.parametrize("trained", ["x", "weight"])
def test_no_more_is_kept_for_gradients_than_they_need(trained, onednn):
    linear, x = nn.Linear(24, 30), torch.randn(5, 24, requires_grad=trained == "x")
    linear.requires_grad_(trained == "weight")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        y = project(linear, x)
    assert kept == [linear.weight.shape if trained == "x" else x.shape]
    y.sum().backward()
    assert onednn


@pytest.mark.parametrize("bias", ["strided", "one number", "sparse weight"])
def test_tensors_that_onednn_does_not_take(bias, onednn):
    linear = nn.Linear(24, 30)
    if bias == "strided":
        linear.bias = nn.Parameter(torch.randn(30, 3)[:, 1])
    elif bias == "one number":
        linear.bias = nn.Parameter(torch.randn(1))
    else:
        linear = nn.Linear(24, 30, bias=False)
        linear.weight = nn.Parameter(linear.weight.detach().to_sparse_csr())
    with torch.no_grad():
        for rows in (1, 5):
            x = torch.randn(rows, 24)
            torch.testing.assert_close(project(linear, x), linear(x), rtol=1e-5, atol=1e-5)
    assert onednn == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_traced_programs_have_the_plain_product(grad, onednn):
    class Projecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(24, 30)

        def forward(self, x):
            return project(self.map, x)

    module, x = Projecting(), torch.randn(5, 24)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, x, check_trace=False)
        torch.testing.assert_close(traced(x), module.map(x))
    assert onednn == []


def test_gradients_of_gradients(onednn):
    linear, x = nn.Linear(24, 30), torch.randn(5, 24, requires_grad=True)

    def second(form):
        first = torch.autograd.grad(form(x).pow(3).sum(), [x, linear.weight], create_graph=True)
        return torch.autograd.grad(sum(part.pow(2).sum() for part in first), [x, linear.weight, linear.bias])

    torch.testing.assert_close(second(lambda x: project(linear, x)), second(linear), rtol=1e-4, atol=1e-3)
    assert onednn


@pytest.mark.parametrize("how", ["jvp", "dual", "vmap", "grad", "checkpoint"])
def test_transforms_of_functions(how, onednn):
    """Those of torch.func take the plain product; what saves memory computes the same twice."""
    linear, x, v = nn.Linear(24, 30), torch.randn(4, 5, 24), torch.randn(4, 5, 24)

    def transformed(form):
        if how == "jvp":
            return torch.func.jvp(form, (x,), (v,))
        if how == "dual":
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(form(forward_ad.make_dual(x, v))).tangent
        if how == "vmap":
            return torch.func.vmap(form)(x)
        if how == "grad":
            return torch.func.grad(lambda x: form(x).square().sum())(x)
        leaf = x.clone().requires_grad_()
        checkpoint(form, leaf, use_reentrant=False).square().sum().backward()
        return leaf.grad

    found, expected = transformed(lambda x: project(linear, x)), transformed(linear)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert bool(onednn) == (how == "checkpoint")


@torch.no_grad()
def test_other_inputs_take_the_plain_product(two_threads, products, onednn, monkeypatch):
    linear, rows = nn.Linear(24, 30), torch.randn(1, 5, 24)
    torch.testing.assert_close(project(linear, rows[:, :0]), linear(rows[:, :0]), rtol=0, atol=0)
    narrow, x = nn.Linear(24, 30, dtype=torch.bfloat16), torch.randn(1, 1, 24, dtype=torch.bfloat16)
    torch.testing.assert_close(project(narrow, x), narrow(x), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert project(linear, rows).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        project(linear, rows)
    turned = nn.Linear(24, 30)
    turned.weight = nn.Parameter(torch.randn(24, 30).T)
    assert torch.equal(project(turned, rows), turned(rows))
    monkeypatch.setattr(onednn_bmojo, "WORTH", rows.numel() * 30 + 1)
    project(linear, rows)
    assert products == onednn == []


@torch.no_grad()
def test_a_row_that_cannot_be_cut_is_onednn_s(two_threads, products, onednn):
    prime, x = nn.Linear(24, 31), torch.ones(1, 1, 24)
    torch.testing.assert_close(project(prime, x), prime(x), rtol=1e-6, atol=1e-6)
    torch.set_num_threads(1)
    project(nn.Linear(24, 30), x)
    assert products == [] and len(onednn) == 2


@torch.no_grad()
def test_who_counts_operations_finds_the_plain_product(onednn):
    linear, x = nn.Linear(24, 30), torch.randn(1, 5, 24)
    with FlopCounterMode(display=False) as counter:
        project(linear, x)
    assert counter.get_total_flops() == 2 * 5 * 24 * 30 and onednn == []


@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_by_onednn_is_that_in_double_precision(name, onednn):
    """Logits without and with gradient, and the gradient of every weight."""
    model = randomize_(BMojoForCausalLM(BMojoConfig(**{**SIZES, **SETTINGS[name]}))).float().eval()
    double, ids = copy.deepcopy(model).double(), torch.randint(1, 61, (2, 30))
    with torch.no_grad():
        found = model(ids).logits
    model(ids, labels=ids).loss.backward(), double(ids, labels=ids).loss.backward()
    for (key, weight), (_, exact) in zip(model.named_parameters(), double.named_parameters(), strict=True):
        if exact.grad is not None:
            distance = (weight.grad.double() - exact.grad).norm()
            assert distance <= 1e-3 * exact.grad.norm() + 1e-6, key
    maps = {key: id(part.weight) for key, part in model.named_modules() if isinstance(part, nn.Linear)}
    seen = {id(args[1]) for args in onednn}
    assert {key.rpartition(".")[2] for key, weight in maps.items() if weight not in seen} <= {"dt_proj"}  # S6's
    torch.testing.assert_close(found.double(), double(ids).logits, rtol=1e-3, atol=1e-4)


def test_parts_keep_every_thread_busy_or_there_are_none():
    assert parts_for(576, 2) == 2 and parts_for(393, 2) == 3 and parts_for(131, 2) == 1
    assert parts_for(576, 1) == 1 and parts_for(576, 5) == 6 and parts_for(7, 8) == 1


# What others do with a linear map ------------------------------------------------------------------------------------
class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class Negated(ModelHook):
    def post_forward(self, module, output):
        return -output


def changed(how):
    """A linear map that gives something else than the product with its weight, and what to undo afterwards."""
    linear, undo = nn.Linear(24, 30), None
    if how == "subclass":
        linear = Doubled(24, 30)
    elif how == "hook":
        linear.register_forward_hook(lambda module, arguments, output: output + 1)
    elif how == "pre-hook":
        linear.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1,))
    elif how == "forward of its own":
        linear.forward = lambda x: nn.functional.linear(x, linear.weight) - 1
    elif how == "accelerate":
        add_hook_to_module(linear, Negated())
    elif how == "parametrisation":
        nn.utils.parametrize.register_parametrization(linear, "weight", Halved())
    elif how == "pruning":
        prune.l1_unstructured(linear, "weight", 0.5)
    elif how == "global hook":
        undo = nn.modules.module.register_module_forward_hook(lambda module, arguments, output: output + 1)
    elif how == "global pre-hook":
        undo = nn.modules.module.register_module_forward_pre_hook(lambda module, arguments: (arguments[0] + 1,))
    else:
        linear = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)[0]
    return linear, undo


@pytest.mark.parametrize(
    "how",
    [
        *("subclass", "hook", "pre-hook", "forward of its own", "accelerate", "parametrisation", "pruning"),
        *("global hook", "global pre-hook", "quantised"),
    ],
)
@torch.no_grad()
def test_whoever_changed_a_map_is_heard(how, two_threads, products, onednn):
    linear, undo = changed(how)
    try:
        for x in (torch.randn(1, 1, 24), torch.randn(1, 5, 24)):
            assert torch.equal(project(linear, x), linear(x))
    finally:
        if undo is not None:
            undo.remove()
    assert products == onednn == []


@pytest.mark.parametrize("how", ["hook", "pre-hook", "global hook", "global pre-hook"])
def test_who_changes_gradients_is_heard(how, onednn):
    linear, x, undo = nn.Linear(24, 30), torch.randn(1, 5, 24, requires_grad=True), None
    if how == "hook":
        linear.register_full_backward_hook(lambda module, given, found: (given[0] * 2,))
    elif how == "pre-hook":
        linear.register_full_backward_pre_hook(lambda module, found: (found[0] * 2,))
    elif how == "global hook":
        undo = nn.modules.module.register_module_full_backward_hook(lambda module, given, found: (given[0] * 2,))
    else:
        undo = nn.modules.module.register_module_full_backward_pre_hook(lambda module, found: (found[0] * 2,))
    try:
        (found,) = torch.autograd.grad(project(linear, x).sum(), x)
    finally:
        if undo is not None:
            undo.remove()
    torch.testing.assert_close(found, 2 * linear.weight.sum(0).expand(1, 5, -1))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_linear_map_of_a_model_is_nn_linear(name):
    for cls in (BMojoForCausalLM, BMojoForSequenceClassification):
        model = cls(BMojoConfig(**{**SIZES, **SETTINGS[name]}))
        found = [module for module in model.modules() if isinstance(module, nn.Linear)]
        assert len(found) > 10 and {type(module) for module in found} == {nn.Linear}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantisation_reaches_every_layer_and_generates(name):
    """pytorch/pytorch#33433: exact types. A quantised module has a method where the weight was."""
    model = randomize_(BMojoForCausalLM(BMojoConfig(**{**SIZES, **SETTINGS[name]}))).float().eval()
    wanted = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    kinds = {key: type(module) for key, module in quantised.named_modules() if key in wanted}
    assert kinds.keys() == wanted and set(kinds.values()) == {torch.ao.nn.quantized.dynamic.Linear}
    ids = torch.randint(1, 61, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        distance = (quantised(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
        assert 0 < distance < 0.5
    assert quantised.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False).shape == (2, 25)


@torch.no_grad()
def test_decoding_uses_all_threads_and_a_hook_is_heard_in_it(two_threads, products):
    """Every map of a decoding step is cut where it can be; a hooked one is called."""
    model = randomize_(BMojoForCausalLM(BMojoConfig(**SIZES, tie_word_embeddings=False))).float().eval()
    cache = BMojoCache(model.config)
    model(torch.arange(1, 20)[None], past_key_values=cache)
    sizes = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    expected = sum(parts_for(size, 2) > 1 for size in sizes) + 2 * model.config.num_hidden_layers  # k, v run twice
    products.clear()
    plain = model(torch.tensor([[3]]), past_key_values=copy.deepcopy(cache)).logits
    assert len(products) >= expected
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, arguments, output: output + 1)
    assert (model(torch.tensor([[3]]), past_key_values=cache).logits - plain).abs().max() > 1e-3


@pytest.mark.parametrize("fields", [{}, {"window_size": 6, "fading_stride": 3}, {"ssm_type": "mamba"}], ids=str)
@torch.no_grad()
def test_few_fp32_rows_compile_without_a_graph_break(fields, two_threads):
    torch.compiler.reset()
    model = randomize_(BMojoForCausalLM(BMojoConfig(**{**SIZES, **fields}))).float().eval()
    step = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.arange(1, 9)[None]
    found, wanted = step(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_one_row_of_compiled_code_is_a_sum_in_fp32(dtype, bias, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    linear, x = nn.Linear(24, 31, bias=bias, dtype=dtype), torch.randn(1, 1, 24, dtype=dtype)
    found, exact = project(linear, x), copy.deepcopy(linear).double()(x.double())
    assert found.dtype == dtype and found.shape == (1, 1, 31)
    torch.testing.assert_close(found, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        *("subclass", "hook", "pre-hook", "forward of its own", "accelerate", "parametrisation", "pruning"),
        *("global hook", "global pre-hook", "quantised"),
    ],
)
@torch.no_grad()
def test_whoever_changed_a_map_is_heard_in_compiled_code(how, monkeypatch):
    x = torch.randn(1, 1, 24)
    linear, undo = changed(how)
    try:
        expected = linear(x)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        found = project(linear, x)
    finally:
        if undo is not None:
            undo.remove()
    assert torch.equal(found, expected)


@torch.no_grad()
def test_more_rows_float64_and_autocast_take_the_plain_product_in_compiled_code(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    linear, wide = nn.Linear(24, 30), nn.Linear(24, 30).double()
    for x in (torch.randn(1, 2, 24), torch.randn(1, 0, 24)):
        assert torch.equal(project(linear, x), linear(x))
    x = torch.randn(1, 1, 24, dtype=torch.float64)
    assert torch.equal(project(wide, x), wide(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert project(linear, torch.randn(1, 1, 24)).dtype == torch.bfloat16


def test_time_step_projections_start_as_mambas():
    """Mamba's dt_proj.weight: uniform within one over the root of its rank, unlike other linear maps."""
    config = BMojoConfig(**{**SIZES, "hidden_size": 64, "ssm_type": "mamba", "ssm_time_step_rank": 9})
    for layer in BMojoForCausalLM(config).model.layers:
        weight = layer.fading.dt_proj.weight.detach()
        assert weight.abs().max() <= 1 / 3 and weight.std() == pytest.approx(1 / 3 / 3**0.5, rel=0.1)
