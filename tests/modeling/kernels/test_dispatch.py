"""One dispatch per operation: who is chosen when, and what is said about it.

`device_type` is replaced where a GPU is needed, so that tensors on the CPU count as CUDA tensors.
"""

import ast
import importlib
import sys
from pathlib import Path

import pytest
import torch

from modeling_bmojo import BMojoConfig, dispatch_bmojo, explain_kernels, kernels_hub
from modeling_bmojo.attention_ops import Whole
from modeling_bmojo.dispatch_bmojo import (
    COVERED,
    ENVIRONMENT,
    OPERATIONS,
    TRITON,
    Kernels,
    Situation,
    choose,
)
from modeling_bmojo.kernels_attention import triton_attention_form, triton_block_attention
from modeling_bmojo.kernels_cuda import KERNELS
from modeling_bmojo.kernels_forms import triton_form
from tests.modeling.kernels.dispatch_cases import (
    attention_sets,
    cast,
    chosen,
    conv_case,
    fake_load,
    python,
    scan_case,
    tiny_model,
)
from tests.modeling.kernels.dispatch_fixtures import PACKAGES
from tests.modeling.kernels.kernel_stubs import CALLS, LAYERS, install
from tests.modeling.test_attention_ops import SCALING
from tests.tiny import VOCAB


pytestmark = pytest.mark.usefixtures("nothing_remembered")


# The choice ----------------------------------------------------------------------------------------------------------
SSM = ("conv", "conv_step", "chunk_scan", "scan_step")


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("device", ["cpu", "mps", "xpu", "meta"])
def test_elsewhere_than_on_cuda_it_is_torch(op, device, installed):
    assert chosen(op, device=device) == ["torch"]


@pytest.mark.parametrize("op", SSM)
def test_installed_packages_come_before_torch_on_cuda(op, installed):
    choice = choose(op, Situation("cuda", torch.bfloat16))
    assert choice.forms[0].backend == "cuda" and choice.forms[-1].backend == "torch"
    assert choice.forms[0].narrow == (op in ("chunk_scan", "scan_step"))


def test_each_package_counts_for_itself(monkeypatch):
    install(monkeypatch, "causal_conv1d")
    assert chosen("conv")[0] == "cuda" and "cuda" not in chosen("chunk_scan")
    assert choose("chunk_scan", Situation("cuda", torch.bfloat16)).passed["cuda"].package == "mamba-ssm"


@pytest.mark.parametrize("op", SSM)
def test_dtype_and_gradients_decide(op, installed):
    assert "cuda" not in chosen(op, dtype=torch.float64)
    assert ("cuda" in chosen(op, grad=True)) == (op in ("conv", "chunk_scan"))


def test_fp32_is_not_rounded_to_tf32_unless_pytorch_may(installed, monkeypatch):
    """mamba-ssm's scan multiplies in TF32; PyTorch's own products do so only when the user allows it."""
    assert "cuda" not in chosen("chunk_scan", dtype=torch.float32)
    assert "TF32" in choose("chunk_scan", Situation("cuda", torch.float32)).passed["cuda"].reason
    assert chosen("chunk_scan", dtype=torch.float32, backend="cuda") == ["cuda"]
    for op in ("conv", "conv_step", "scan_step"):
        assert chosen(op, dtype=torch.float32)[0] == "cuda"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert chosen("chunk_scan", dtype=torch.float32)[0] == "cuda"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_switch_for_tf32_is_read_at_every_call(installed, on_gpu, monkeypatch):
    inputs = cast(scan_case(3, 1, False, 0)[0], torch.float32)
    for allowed in (True, False):
        CALLS.clear()
        monkeypatch.setattr(dispatch_bmojo, "tf32_allowed", lambda: allowed)  # noqa: B023
        Kernels().run("chunk_scan", *inputs)
        assert ["mamba_chunk_scan_combined"] * allowed == CALLS


def test_hub_kernels_come_first_where_they_were_asked_for(installed):
    assert chosen("conv", hub=("conv",))[:2] == ["hub", "cuda"]
    assert chosen("chunk_scan", hub=("conv",))[0] == "cuda"
    reasons = [choose("conv", Situation("cuda", torch.bfloat16, hub=hub)).passed["hub"].reason for hub in (None, ())]
    assert "not asked for" in reasons[0] and "loaded no hub kernel" in reasons[1]


def test_hub_kernels_are_for_the_device_that_they_were_loaded_for():
    """A model that was moved to the CPU afterwards does not run kernels of a GPU there."""
    kernels, inputs = Kernels(), cast(conv_case(3, 1, False, 0)[0], torch.float32)
    kernels.hub = {"conv": kernels_hub.hub_form("conv", LAYERS["causal_conv1d_fn"]())}
    kernels.hub_device = "cuda"
    kernels.run("conv", *inputs)
    assert CALLS == []
    kernels.hub_device = "cpu"
    kernels.run("conv", *inputs)
    assert CALLS == ["causal_conv1d_fn"]


def test_triton_forms_join_by_their_table(monkeypatch):
    """One entry each; here with stand-ins, since kernels are added file by file."""

    def expiry(keys, valid, window, slots, block, queries, held=0, past=0):
        return "expiry by triton"

    def attention(query, offers, block, scaling):
        return "attention by triton"

    def conv(x, weight, bias, history=None):
        return "conv by triton"

    table = {
        "expiry": triton_form(expiry),
        "memory_attention": triton_attention_form(attention),
        "conv": triton_form(conv, backward=False),
    }
    for op in list(TRITON):
        monkeypatch.delitem(TRITON, op)
    for op, form in table.items():
        monkeypatch.setitem(TRITON, op, form)
    monkeypatch.setattr(dispatch_bmojo, "load", fake_load(monkeypatch, triton=True))
    monkeypatch.setattr(dispatch_bmojo, "device_type", lambda tensor: "cuda")
    assert chosen("expiry") == ["triton", "torch"] and chosen("conv") == ["triton", "torch"]
    assert chosen("conv", grad=True) == ["torch"] and chosen("conv", device="cpu") == ["torch"]
    assert "no such operation" in choose("innovation", Situation("cuda", torch.float32)).passed["triton"].reason
    kernels, query = Kernels(), torch.zeros(1, 1, 2, 2)
    assert kernels.run("expiry", query, None, 1, 1, 1, 1) == "expiry by triton"
    assert kernels.run("memory_attention", query, [], 1, 1.0) == ("attention by triton", None)
    sets = attention_sets(4, 2, 0, seed=0)
    query = torch.randn(2, 4, 4, 6, dtype=torch.float64)
    for options in (dict(columns=4, implementation="eager"), dict(dropout=0.5), dict(implementation="eager")):
        out, _ = kernels.run("memory_attention", query, sets, 4, SCALING, **options)
        assert isinstance(out, torch.Tensor)


def without_a_line(source: str) -> list[str]:
    """Public functions of a kernel file that its table does not name, and nothing that the table names uses."""
    tree = ast.parse(source)
    uses = {
        node.name: {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    (table,) = [node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "KERNELS"]
    reached, queue = set(), [name.id for name in ast.walk(table.value) if isinstance(name, ast.Name)]
    while queue:
        name = queue.pop()
        if name in uses and name not in reached:
            reached.add(name)
            queue += uses[name]
    return [name for name in uses if not name.startswith("_") and name not in reached]


def test_a_kernel_that_no_table_names_is_found():
    file = "def conv(x): pass\n\ndef _helper(x): pass\n\ndef scan(x): inner(x)\n\ndef inner(x): pass\n"
    assert without_a_line(file + 'KERNELS = {"conv": triton_form(conv)}') == ["scan", "inner"]
    assert without_a_line(file + 'KERNELS = {"conv": triton_form(conv), "scan": triton_form(scan)}') == []


def test_every_triton_kernel_is_in_the_table():
    """One line in its file's table; what is left there to be told is a whole file that the dispatch does not know."""
    folder, found = Path(dispatch_bmojo.__file__).parent, {}
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "\n@jit\n" in source and path.stem != "kernels_common":
            assert without_a_line(source) == [], f"{path.name}: its table KERNELS does not name them"
            found |= importlib.import_module(f"modeling_bmojo.{path.stem}").KERNELS
    assert found == TRITON and set(found) <= set(OPERATIONS)


# Forcing a backend ---------------------------------------------------------------------------------------------------
FORCED = [
    ("conv", "cuda", dict(device="cpu"), "it needs CUDA tensors, these are on 'cpu'; move the model to a GPU"),
    ("chunk_scan", "cuda", dict(), "mamba_ssm is not installed; pip install mamba-ssm"),
    ("conv_step", "cuda", dict(), "causal_conv1d is not installed; pip install causal-conv1d"),
    ("expiry", "triton", dict(device="cpu"), "it needs CUDA tensors, these are on 'cpu'; move the model to a GPU"),
    ("conv", "hub", dict(), "hub kernels were not asked for; load with from_pretrained(..., use_kernels=True)"),
    ("conv", "hub", dict(hub=()), "transformers loaded no hub kernel of it for 'cuda'; set 'auto'"),
]


@pytest.mark.parametrize("op, backend, situation, reason", FORCED)
def test_a_forced_backend_that_is_missing_is_an_error(op, backend, situation, reason, monkeypatch):
    monkeypatch.setattr(dispatch_bmojo, "INTERPRETED", False)
    with pytest.raises(ValueError) as error:
        chosen(op, backend=backend, **situation)
    assert str(error.value).startswith(f"kernel_backend={backend!r}: cannot run operation {op!r}: {reason}")


@pytest.mark.parametrize(
    "op, situation, reason",
    [
        ("scan_step", dict(grad=True), "selective_state_update has no backward; call under torch.no_grad()"),
        ("conv", dict(dtype=torch.float64), "it does not compute in torch.float64; load the model in float32"),
    ],
)
def test_a_forced_backend_that_cannot_is_an_error(op, situation, reason, installed):
    with pytest.raises(ValueError, match=f"kernel_backend='cuda': cannot run operation '{op}': {reason}"):
        chosen(op, backend="cuda", **situation)


@pytest.mark.parametrize("taps, channels, reason", [(5, 16, "2 to 4 taps, the model 5"), (4, 12, "multiple of 8")])
def test_a_call_of_other_sizes_goes_on_to_the_next_form(taps, channels, reason, installed, on_gpu):
    """Sizes are seen at the call: the next form takes it, and a forced one is an error."""
    x, weight, bias = torch.randn(2, 5, channels), torch.randn(channels, taps), torch.randn(channels)
    following = TRITON["conv"].call
    torch.testing.assert_close(Kernels().run("conv", x, weight, bias), following(x, weight, bias), rtol=0, atol=0)
    assert CALLS == []
    forced = Kernels(BMojoConfig(kernel_backend="cuda"))
    with pytest.raises(
        ValueError, match=rf"kernel_backend='cuda': cannot run operation 'conv': .*{reason}.*; set it to"
    ):
        forced.run("conv", x, weight, bias)


@pytest.mark.parametrize("backend", ["cuda", "hub", "triton"])
def test_forcing_is_about_what_a_backend_covers(backend, installed):
    """Operations that a backend has not by nature are chosen as if nothing had been forced."""
    for op in set(OPERATIONS) - COVERED[backend]:
        assert chosen(op, backend=backend) == chosen(op, backend="auto")
    assert COVERED["cuda"] == COVERED["hub"] == set(KERNELS) and COVERED["torch"] == set(OPERATIONS)


@pytest.mark.parametrize("op", OPERATIONS)
def test_torch_can_always_be_forced(op, installed):
    assert chosen(op, backend="torch") == ["torch"]


def test_the_environment_wins(installed, monkeypatch):
    def setting(value):
        monkeypatch.setenv(ENVIRONMENT, value)
        dispatch_bmojo.forget()

    setting("torch")
    assert chosen("conv", backend="cuda") == ["torch"]
    setting("auto")
    assert chosen("conv", backend="torch")[0] == "cuda"
    setting("cuda")
    with pytest.raises(ValueError, match=r"^BMOJO_KERNEL_BACKEND='cuda': cannot run operation 'conv': it needs CUDA"):
        chosen("conv", device="cpu")
    setting("")
    assert chosen("conv", backend="torch") == ["torch"]


def test_the_environment_is_read_once(monkeypatch):
    """At the first operation: looking it up takes longer than the choice itself."""
    kernels, inputs = Kernels(), cast(conv_case(3, 1, False, 0)[0], torch.float32)
    kernels.run("conv", *inputs)
    monkeypatch.setenv(ENVIRONMENT, "cuda")
    kernels.run("conv", *inputs)
    dispatch_bmojo.forget()
    with pytest.raises(ValueError, match="needs CUDA"):
        kernels.run("conv", *inputs)


def test_unknown_backends_are_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"kernel_backend='cudnn': must be one of \['auto', 'hub', 'cuda', 'triton'"):
        BMojoConfig(kernel_backend="cudnn")
    monkeypatch.setenv(ENVIRONMENT, "fast")
    dispatch_bmojo.forget()
    with pytest.raises(ValueError, match=r"BMOJO_KERNEL_BACKEND='fast': must be one of \['auto'"):
        chosen("conv")


def test_the_backend_is_no_part_of_a_caches_identity():
    model = tiny_model()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(9)[None] % VOCAB).past_key_values
        model.config.kernel_backend = "torch"
        cache.check(model.config)


# Packages ------------------------------------------------------------------------------------------------------------
def test_a_broken_package_keeps_its_reason(tmp_path, monkeypatch):
    """`import mamba_ssm` pulls in much and may raise anything."""
    package = tmp_path / "mamba_ssm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('CUDA driver too old\\nand more lines')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    install(monkeypatch, "causal_conv1d")
    refusal = choose("chunk_scan", Situation("cuda", torch.bfloat16)).passed["cuda"]
    assert refusal.reason == "mamba_ssm cannot be imported (RuntimeError: CUDA driver too old)"
    assert chosen("chunk_scan")[-1] == "torch" and chosen("conv")[0] == "cuda"
    with pytest.raises(
        ValueError, match=r"cannot be imported \(RuntimeError: CUDA driver too old\); pip install mamba-ssm"
    ):
        chosen("chunk_scan", backend="cuda")


def test_a_package_without_the_function_keeps_its_reason(monkeypatch):
    install(monkeypatch, "causal_conv1d")
    monkeypatch.delattr(sys.modules["causal_conv1d"], "causal_conv1d_update")
    assert "AttributeError" in choose("conv_step", Situation("cuda", torch.bfloat16)).passed["cuda"].reason
    assert chosen("conv")[0] == "cuda"


def test_a_choice_is_made_once(installed, on_gpu, monkeypatch):
    """Decoding imports nothing and chooses nothing anew."""
    kernels, inputs = Kernels(), cast(conv_case(1, 1, True, 0)[0], torch.float32)
    with torch.no_grad():
        kernels.run("conv_step", *inputs)
        monkeypatch.setattr(dispatch_bmojo, "choose", None)
        monkeypatch.setattr(importlib, "import_module", None)
        kernels.run("conv_step", *inputs)
    assert CALLS == ["causal_conv1d_update"] * 2


def test_a_form_stays_the_same_object(installed):
    """A compiler guards on it: another object of the same kind would compile the model again."""
    first, second = (choose(op, Situation("cuda", torch.bfloat16)).forms[0] for op in ("conv", "conv"))
    assert first.call is second.call


def test_nothing_is_imported_for_the_cpu(tmp_path):
    """Neither importing the package nor running it on a CPU imports triton, causal_conv1d or mamba_ssm."""
    code = (
        "import sys, torch; from modeling_bmojo import BMojoConfig, BMojoForCausalLM\n"
        "config = BMojoConfig(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1, "
        "num_attention_heads=2, window_size=3, eidetic_size=2)\n"
        "BMojoForCausalLM(config)(input_ids=torch.arange(8)[None])\n"
        "print(sorted({'causal_conv1d', 'mamba_ssm', 'kernels'} & set(sys.modules)))"
    )
    names = {"causal_conv1d": "raise RuntimeError", "mamba_ssm": "raise RuntimeError"}
    for name, text in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    assert python(code, tmp_path).stdout.strip() == "[]"


# The one message -----------------------------------------------------------------------------------------------------
def run_all(kernels=None):
    kernels = kernels or Kernels()
    with torch.no_grad():
        kernels.run("conv", *cast(conv_case(3, 1, False, 0)[0], torch.bfloat16))
        kernels.run("conv_step", *cast(conv_case(1, 1, True, 0)[0], torch.bfloat16))
        kernels.run("chunk_scan", *cast(scan_case(3, 1, False, 0)[0], torch.float32))
        kernels.run("conv", *cast(conv_case(3, 1, False, 0)[0], torch.float32))


def test_a_gpu_user_is_told_once_what_is_missing(said, on_gpu, monkeypatch):
    monkeypatch.setattr(dispatch_bmojo, "load", fake_load(monkeypatch, triton=True))
    run_all()
    run_all(Kernels(BMojoConfig()))
    assert len(said) == 1
    assert "causal_conv1d is not installed; mamba_ssm is not installed" in said[0]
    assert "pip install causal-conv1d mamba-ssm" in said[0] and "triton" not in said[0]


def test_only_what_is_missing_is_named(said, on_gpu, monkeypatch):
    install(monkeypatch, "causal_conv1d")
    monkeypatch.setattr(dispatch_bmojo, "load", fake_load(monkeypatch, triton=True))
    run_all()
    assert len(said) == 1 and "mamba_ssm is not installed" in said[0] and "causal_conv1d" not in said[0]


@pytest.mark.parametrize("setting", ["torch", "auto"])
def test_nobody_else_is_told_anything(said, setting, monkeypatch):
    """On the CPU, with a forced backend, or with everything installed."""
    run_all()
    monkeypatch.setattr(dispatch_bmojo, "device_type", lambda tensor: "cuda")
    monkeypatch.setattr(dispatch_bmojo, "tf32_allowed", lambda: True)
    if setting == "auto":
        install(monkeypatch, *PACKAGES)
    run_all(Kernels(BMojoConfig(kernel_backend=setting)))
    assert said == []


def test_the_message_goes_through_transformers_logger(on_gpu, monkeypatch, caplog):
    monkeypatch.setattr(dispatch_bmojo, "load", fake_load(monkeypatch, triton=False))
    monkeypatch.setattr(dispatch_bmojo.logger, "propagate", True)
    with caplog.at_level("WARNING"):
        run_all()
        run_all()
    assert [r.levelname for r in caplog.records if "explain_kernels" in r.getMessage()] == ["WARNING"]


# explain_kernels -----------------------------------------------------------------------------------------------------
def test_explain_on_the_cpu(capsys, installed):
    rows = explain_kernels(tiny_model())
    printed = capsys.readouterr().out
    assert [row.operation for row in rows] == list(OPERATIONS)
    assert all(row.inference.startswith("torch: ") and row.training == row.inference for row in rows)
    others = ["s6_scan", "s6_step", "delta_scan", "delta_step", "kalma_scan", "kalma_step"]
    assert [row.operation for row in rows if not row.used] == others
    assert "s6_scan (not in this model)" in printed and "conv (not in this model)" not in printed
    assert "B'MOJO kernels for torch.float32 on cpu, kernel_backend='auto'" in printed
    assert (
        "cuda for conv, conv_step, chunk_scan, scan_step, s6_scan, s6_step" in printed
        and "these are on 'cpu'" in printed
    )


def test_explain_says_what_each_operation_uses_on_a_gpu(capsys, monkeypatch):
    install(monkeypatch, "causal_conv1d")
    rows = {row.operation: row for row in explain_kernels(tiny_model(), device="cuda", dtype=torch.bfloat16)}
    printed = capsys.readouterr().out
    assert rows["conv"].inference == rows["conv"].training == "causal-conv1d: causal_conv1d_fn"
    assert rows["conv_step"][1:3] == ("causal-conv1d: causal_conv1d_update", "triton: causal_conv")
    assert rows["conv_step"].passed["cuda"][0] == "in training, causal_conv1d_update has no backward"
    assert rows["chunk_scan"].inference == "torch: ssm_ops.chunk_ssd"
    assert rows["chunk_scan"].passed["cuda"] == (
        "mamba_ssm is not installed",
        "pip install mamba-ssm (it compiles with nvcc)",
    )
    assert rows["memory_attention"].inference == rows["memory_attention"].training == "triton: triton_block_attention"
    assert (
        "cuda for chunk_scan, scan_step, s6_scan, s6_step: mamba_ssm is not installed (pip install mamba-ssm" in printed
    )
    assert "conv_step" in printed and "causal-conv1d: causal_conv1d_update" in printed


def test_explain_looks_at_the_models_sizes(installed, capsys):
    config = BMojoConfig(ssm_conv_kernel=5, head_dim=512, attention_dropout=0.1, ssm_type="mamba")
    rows = {row.operation: row for row in explain_kernels(config, "cuda", torch.bfloat16)}
    assert rows["conv"].inference.startswith("triton") and "2 to 4 taps" in rows["conv"].passed["cuda"][0]
    assert rows["memory_attention"].inference.startswith("torch")
    assert "at most 256 channels, the model's have 512" in rows["memory_attention"].passed["triton"][0]
    assert rows["s6_scan"].inference == "mamba-ssm: selective_scan_fn"
    config = BMojoConfig(attention_dropout=0.1)
    row = {row.operation: row for row in explain_kernels(config, "cuda", torch.bfloat16)}["memory_attention"]
    assert row.inference.startswith("triton") and row.training.startswith("torch")
    assert row.passed["triton"][0] == "in training, it has no dropout"


def test_explain_shows_what_is_forced_and_what_fails(capsys, monkeypatch):
    rows = {row.operation: row for row in explain_kernels(BMojoConfig(kernel_backend="cuda"), device="cpu")}
    assert rows["conv"].inference.startswith("error: kernel_backend='cuda': cannot run operation 'conv'")
    assert rows["expiry"].inference.startswith("torch") and "error: kernel_backend='cuda'" in capsys.readouterr().out
    monkeypatch.setenv(ENVIRONMENT, "torch")
    dispatch_bmojo.forget()
    assert all(row.inference.startswith("torch") for row in explain_kernels(BMojoConfig(kernel_backend="cuda")))
    assert "BMOJO_KERNEL_BACKEND='torch'" in capsys.readouterr().out


def test_explain_marks_what_a_model_does_not_have(capsys):
    rows = {row.operation: row for row in explain_kernels(BMojoConfig(layer_types=["sliding_attention"] * 24))}
    assert [op for op, row in rows.items() if row.used] == ["expiry", "memory_attention"]
    assert "chunk_scan (not in this model)" in capsys.readouterr().out


def test_explain_tells_nobody_off(said, capsys):
    explain_kernels(device="cuda", dtype=torch.bfloat16)
    assert said == [] and "is not installed" in capsys.readouterr().out


def test_explain_wants_a_model():
    with pytest.raises(ValueError, match=r"model_or_config=Linear: must be a B'MOJO model or BMojoConfig"):
        explain_kernels(torch.nn.Linear(1, 1))


def test_the_triton_attention_refuses_keys_that_differ_per_head():
    """They are the torch form's: an index `[B, n, G, K]`, and what a part offers ready made."""
    refuse = triton_attention_form(triton_block_attention).refuse
    query = torch.empty(1, 4, 4, 8)
    assert refuse(query, [(None, (0, 3)), (None, torch.zeros(1, 1, 3))], 4, 1.0) is None
    for offer in ((None, torch.zeros(1, 1, 2, 3)), Whole(query, query)):
        assert "differ per head" in refuse(query, [offer], 4, 1.0)
