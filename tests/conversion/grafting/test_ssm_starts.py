"""What the starts of all other fading memories share: `ssm_init` of `delta`, `kalmanet` and `mamba`.

Each is a running average of the layer's input, as the smoother is; of what, exactly, test_ssm_delta, test_ssm_kalmanet
and test_ssm_mamba say.
"""

import pytest
import torch
from transformers import LlamaConfig

from conversion.grafting.families import bmojo_config_for
from conversion.grafting.report import read_report
from conversion.grafting.ssm_init import SSM_INITS
from modeling_bmojo import BMojoForCausalLM
from tests.conversion.graft_sources import SIZES, VOCAB, W, graft, logits, save_source


TAU = (2.0, 9.0)
STARTS = ("delta", "kalmanet", "mamba")
SOURCES = ("llama", "qwen3", "llama_biases_tied", "llama_narrow_heads")


def start_config(start, **memory):
    """The configuration of a graft that starts so."""
    init = SSM_INITS[start]
    return bmojo_config_for(LlamaConfig(**SIZES), init.complete(SIZES, {"window_size": W, **init.fields, **memory}))


def readers(config):
    """k_proj and v_proj of a layer, which a narrow SSM keeps the inputs of."""
    shape = config.num_key_value_heads * config.head_dim, config.hidden_size
    return {name: torch.randn(shape) for name in ("k_proj.weight", "v_proj.weight")}


def started(start, config, tau=TAU, layer=None):
    """The first layer's fading memory, in float64."""
    fading = BMojoForCausalLM(config).model.layers[0].fading
    tensors = SSM_INITS[start].build(config, readers(config) if layer is None else layer, tau)
    fading.load_state_dict(tensors, strict=True)
    return fading.double()


@pytest.mark.parametrize(
    ("start", "name"), [*(("delta", name) for name in SOURCES), ("kalmanet", "qwen3"), ("mamba", "llama_narrow_heads")]
)
def test_a_graft_accounts_for_every_tensor_and_keeps_the_source(start, name, tmp_path):
    source, init = save_source(tmp_path / "source", name), SSM_INITS[start]
    assert graft(tmp_path, "--set", f"ssm_type={init.fields['ssm_type']}", ssm_init=start) == 0
    report = read_report(tmp_path / "graft")
    target = {key for key, entry in report["target_tensors"].items() if init.describe in str(entry)}
    model = BMojoForCausalLM.from_pretrained(tmp_path / "graft")
    assert model.config.ssm_type == init.fields["ssm_type"] and model.config.ssm_state_size == 16
    assert target == {key for key in model.state_dict() if ".fading." in key}
    torch.testing.assert_close(logits(model), logits(source), atol=1e-5, rtol=1e-5)
    assert bool(logits(model, 5 * W).isfinite().all())


@pytest.mark.parametrize("start", STARTS)
def test_a_gradient_reaches_every_tensor(start):
    config = start_config(start)
    model = BMojoForCausalLM(config)
    for layer in model.model.layers:
        layer.fading.load_state_dict(SSM_INITS[start].build(config, readers(config)))
    ids = torch.randint(3, VOCAB, (1, 3 * W))
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.model.layers[0].fading.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("start", "assignment", "word"),
    [
        *((start, "ssm_type=mamba2", f"needs ssm_type='{SSM_INITS[start].fields['ssm_type']}'") for start in STARTS),
        *((start, "smoother_tau=[0,3]", "smoother_tau") for start in STARTS),
        ("delta", "ssm_conv_act=silu", "needs ssm_conv_act='linear'"),
        ("delta", "ssm_projected=false", "needs ssm_projected=True"),
        ("delta", "ssm_proj_bias=false", "needs ssm_proj_bias=True"),
        ("mamba", "ssm_conv_bias=false", "needs ssm_conv_bias=True"),
        ("mamba", "ssm_num_heads=0", "ssm_num_heads"),
    ],
)
def test_the_program_refuses_before_any_work(start, assignment, word, tmp_path, capsys):
    save_source(tmp_path / "source")
    assert graft(tmp_path, "--set", assignment, ssm_init=start) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "graft").exists()


@pytest.mark.parametrize(
    ("start", "memory", "message"),
    [
        *((start, {"ssm_gated": True}, f"ssm_gated=True: ssm_init='{start}' needs False") for start in STARTS),
        *((start, {"ssm_time_step_limit": [0.3, 1.0]}, "clamp") for start in STARTS),
        ("kalmanet", {"ssm_num_heads": 4, "ssm_num_groups": 1}, "ssm_num_groups=1: ssm_init='kalmanet' needs 4"),
        ("mamba", {"ssm_num_heads": 1, "ssm_head_dim": 1}, "needs 2 channels"),
    ],
)
def test_what_it_cannot_honour_is_refused(start, memory, message):
    with pytest.raises(ValueError, match=message):
        SSM_INITS[start].check(start_config(start, **memory), TAU)
