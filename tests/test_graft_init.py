"""Families as data, shipped settings, and the smoother: what the initialised memories compute before any training."""

from pathlib import Path

import pytest
import torch
import yaml
from graft_sources import SIZES, SOURCES, VOCAB, W, randomised
from transformers import LlamaConfig

from conversion.families import FAMILIES, MEMORY_FIELDS, bmojo_config_for, target_of
from conversion.settings import KNOWN_KEYS, load_settings
from conversion.ssm_init import SMOOTHER_FIELDS, inner_projection, smoother, smoother_time_constants
from modeling_bmojo import BMojoConfig, BMojoForCausalLM


ROOT = Path(__file__).resolve().parents[1]


def test_settings_that_a_graft_may_set_are_config_fields():
    fields = BMojoConfig.__dataclass_fields__
    assert set(MEMORY_FIELDS) <= set(fields)
    memory = {name for name in fields if name.startswith(("ssm_", "eidetic_", "innovation", "fading_", "memory_"))}
    assert memory <= set(MEMORY_FIELDS)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "graft").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_settings_are_valid_and_show_their_command(path):
    settings = load_settings(path)
    config = bmojo_config_for(LlamaConfig(), {**SMOOTHER_FIELDS, **settings.memory}, settings.layers)
    assert config.window_size == settings.memory["window_size"]
    assert f"python -m conversion.graft {path.relative_to(ROOT).as_posix()}" in path.read_text()
    assert set(yaml.safe_load(path.read_text())) <= set(KNOWN_KEYS)


def test_facts_of_the_source_cannot_be_overridden():
    with pytest.raises(ValueError, match=r"hidden_size=8.*fact of the source"):
        bmojo_config_for(SOURCES["llama"], {"hidden_size": 8})


def test_every_family_maps_the_names_that_transformers_saves():
    for family in FAMILIES:
        config = next(config for config in SOURCES.values() if config.model_type == family.model_type)
        names = randomised(config).state_dict().keys()
        kept = {target_of(config, name)[0] for name in names} - {None}
        target = BMojoForCausalLM(bmojo_config_for(config, {})).state_dict().keys()
        assert kept <= set(target), family.name


def smoother_config(**sizes) -> BMojoConfig:
    return bmojo_config_for(LlamaConfig(**{**SIZES, **sizes}), {**SMOOTHER_FIELDS, "window_size": W})


def memory_of(config: BMojoConfig, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    fading = BMojoForCausalLM(config).model.layers[0].fading
    fading.load_state_dict(tensors)
    return fading.double()


def running_average(u: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """sum_j (1 - a) a^j u_{t-j} with a = exp(-1 / tau), tau per channel `[C]`, u `[T, C]`; token by token."""
    keep, average, out = torch.exp(-1 / tau), torch.zeros(u.shape[1], dtype=u.dtype), []
    for step in u:
        average = keep * average + (1 - keep) * step
        out.append(average)
    return torch.stack(out)


@pytest.mark.parametrize("head_dim", [8, 16, 12], ids=["equal", "twice", "one_and_a_half"])
def test_smoother_outputs_the_running_average_of_its_input(head_dim):
    config = smoother_config(head_dim=head_dim)
    tau = (2.0, 32.0)
    u = torch.randn(1, 50, 32, dtype=torch.float64)
    y, _ = memory_of(config, smoother(config, {}, tau))(u, torch.tensor([50]))
    rows = torch.arange(4 * head_dim)
    per_channel = smoother_time_constants(4, *tau)[rows // head_dim]
    averages = running_average(u[0][:, rows % 32], per_channel)
    copies = torch.zeros(50, 32, dtype=torch.float64).index_add_(1, rows % 32, averages)
    torch.testing.assert_close(y[0], copies / torch.bincount(rows % 32), atol=1e-6, rtol=1e-6)
    constant = torch.ones(1, 600, 32, dtype=torch.float64)
    y, _ = memory_of(config, smoother(config, {}, tau))(constant, torch.tensor([600]))
    torch.testing.assert_close(y[0, -1], constant[0, -1], atol=1e-6, rtol=1e-6)  # the weights sum to one


def test_narrow_smoother_keeps_what_keys_and_values_read():
    """inner = 4 * 6 = 24 < hidden = 32, and k_proj and v_proj read 2 * 2 * 6 = 24 directions."""
    config = smoother_config(head_dim=6)
    layer = {"k_proj.weight": torch.randn(12, 32), "v_proj.weight": torch.randn(12, 32)}
    u = torch.randn(1, 40, 32, dtype=torch.float64)
    y, _ = memory_of(config, smoother(config, layer, (5.0, 5.0)))(u, torch.tensor([40]))
    average = running_average(u[0], torch.full((32,), 5.0, dtype=torch.float64))
    for weight in layer.values():
        torch.testing.assert_close(y[0] @ weight.double().T, average @ weight.double().T, atol=1e-5, rtol=1e-5)
    projection = inner_projection(config, layer)
    torch.testing.assert_close(projection @ projection.T, torch.eye(24, dtype=torch.float64))


def test_smoother_lets_a_gradient_reach_every_tensor():
    config = smoother_config()
    model = BMojoForCausalLM(config)
    for layer in model.model.layers:
        layer.fading.load_state_dict(smoother(config, {}))
    ids = torch.randint(3, VOCAB, (1, 3 * W))
    model(input_ids=ids, labels=ids).loss.backward()
    fading = model.model.layers[0].fading
    for name, parameter in fading.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    inner, states = 32, 2 * config.ssm_state_size
    parts = dict(zip(("x", "B", "C", "dt"), fading.in_proj.weight.grad.split([inner, states, states, 4])))
    assert all(part.abs().max() > 0 for part in parts.values()), {
        name: part.abs().max() for name, part in parts.items()
    }


def test_smoother_refuses_a_config_that_it_cannot_honour():
    with pytest.raises(ValueError, match=r"ssm_gated=True.*needs ssm_gated=False"):
        smoother(BMojoConfig(hidden_size=32, num_attention_heads=4, **{**SMOOTHER_FIELDS, "ssm_gated": True}), {})
