"""Families as data, shipped settings, and the smoother: what the initialised memories compute before any training."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, Qwen3Config

from conversion.grafting.families import (
    FAMILIES,
    MEMORY_FIELDS,
    OTHER_FIELDS,
    backbone_fields,
    bmojo_config_for,
    targets_of,
)
from conversion.grafting.family_table import COMMON_FIELDS, Family
from conversion.grafting.settings import KNOWN_KEYS, load_settings
from conversion.grafting.ssm_init import (
    SMOOTHER_DEFAULTS,
    SMOOTHER_FIELDS,
    inner_projection,
    lean_memory,
    smoother,
    smoother_time_constants,
)
from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from tests.conversion.graft_sources import SIZES, SOURCES, VOCAB, W, graft, logits, randomised, save_source


ROOT = Path(__file__).resolve().parents[3]


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
        kept = {goal for name in names for goal in targets_of(config, name)[0]}
        target = BMojoForCausalLM(bmojo_config_for(config, {})).state_dict().keys()
        assert kept == {name for name in target if ".fading." not in name} - {"lm_head.weight"} | (
            set() if config.tie_word_embeddings else {"lm_head.weight"}
        ), family.name


def smoother_config(projected=True, **sizes) -> BMojoConfig:
    memory = {**SMOOTHER_FIELDS, "window_size": W, "ssm_projected": projected}
    return bmojo_config_for(LlamaConfig(**{**SIZES, **sizes}), memory)


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


@pytest.mark.parametrize(
    ("head_dim", "projected"),
    [(8, False), (8, True), (16, True), (12, True)],
    ids=["unprojected", "equal", "twice", "one_and_a_half"],
)
def test_smoother_outputs_the_running_average_of_its_input(head_dim, projected):
    config = smoother_config(projected, head_dim=head_dim)
    tau = (2.0, 32.0)
    u = torch.randn(1, 50, 32, dtype=torch.float64)
    y, _ = memory_of(config, smoother(config, {}, tau))(u)
    rows = torch.arange(4 * head_dim)
    per_channel = smoother_time_constants(4, *tau)[rows // head_dim]
    averages = running_average(u[0][:, rows % 32], per_channel)
    copies = torch.zeros(50, 32, dtype=torch.float64).index_add_(1, rows % 32, averages)
    torch.testing.assert_close(y[0], copies / torch.bincount(rows % 32), atol=1e-6, rtol=1e-6)
    constant = torch.ones(1, 600, 32, dtype=torch.float64)
    y, _ = memory_of(config, smoother(config, {}, tau))(constant)
    torch.testing.assert_close(y[0, -1], constant[0, -1], atol=1e-6, rtol=1e-6)  # the weights sum to one


def test_narrow_smoother_keeps_what_keys_and_values_read():
    """inner = 4 * 6 = 24 < hidden = 32, and k_proj and v_proj read 2 * 2 * 6 = 24 directions."""
    config = smoother_config(head_dim=6)
    layer = {"k_proj.weight": torch.randn(12, 32), "v_proj.weight": torch.randn(12, 32)}
    u = torch.randn(1, 40, 32, dtype=torch.float64)
    y, _ = memory_of(config, smoother(config, layer, (5.0, 5.0)))(u)
    average = running_average(u[0], torch.full((32,), 5.0, dtype=torch.float64))
    for weight in layer.values():
        torch.testing.assert_close(y[0] @ weight.double().T, average @ weight.double().T, atol=1e-5, rtol=1e-5)
    projection = inner_projection(24, 32, layer)
    torch.testing.assert_close(projection @ projection.T, torch.eye(24, dtype=torch.float64))


def test_unprojected_smoother_is_the_projected_one_without_its_identities():
    tensors, lean = (smoother(smoother_config(projected), {}, seed=3) for projected in (True, False))
    identity = torch.eye(32)
    assert torch.equal(tensors.pop("out_proj.weight"), identity)
    x, others = tensors["in_proj.weight"].split([32, len(lean["in_proj.weight"])])
    assert torch.equal(x, identity)
    tensors["in_proj.weight"] = others
    assert tensors.keys() == lean.keys() and all(torch.equal(tensors[name], lean[name]) for name in lean)


@pytest.mark.parametrize(
    ("source", "memory", "chosen"),
    [
        ("llama", {}, (False, 4, 8, 2)),
        ("llama", {"ssm_projected": True}, (True, 4, 8, 2)),
        ("llama", {"ssm_num_heads": 8, "ssm_head_dim": 4}, (False, 8, 4, 2)),
        ("llama", {"ssm_num_heads": None, "ssm_num_groups": 4}, (False, 4, 8, 4)),
        ("llama", {"ssm_head_dim": 4}, (True, 4, 4, 2)),
        ("llama_narrow_heads", {}, (True, 4, 6, 2)),  # 32 channels are no whole number of heads of 6
        ("qwen3", {}, (False, 2, 16, 2)),  # 4 heads of 16 attend, 2 of them hold the 32 channels
        ("qwen3", {"ssm_num_groups": 1}, (False, 2, 16, 1)),
        ("qwen3", {"ssm_projected": True}, (True, 4, 16, 2)),
        ("qwen3", {"ssm_num_heads": 4}, (True, 4, 16, 2)),
    ],
    ids=str,
)
def test_the_smoother_does_without_projections_where_the_sizes_allow_it(source, memory, chosen):
    memory = lean_memory(backbone_fields(SOURCES[source]), {**SMOOTHER_FIELDS, **memory})
    config = bmojo_config_for(SOURCES[source], memory)
    sizes = (config.ssm_num_heads, config.ssm_head_dim, config.ssm_num_groups)
    assert (config.ssm_projected, *sizes) == chosen


def test_groups_divide_the_heads_of_the_ssm_and_the_key_value_heads():
    """12 attention heads of 8 and 6 key/value heads at 32 channels: 4 heads of 8, in gcd(4, 6) = 2 groups."""
    source = Qwen3Config(**{**SIZES, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8})
    memory = lean_memory(backbone_fields(source), {})
    assert memory == {"ssm_projected": False, "ssm_num_heads": 4, "ssm_num_groups": 2, **SMOOTHER_DEFAULTS}


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(("name", "default", "other"), [("ssm_state_size", 16, 5), ("innovation", "key", "output")])
def test_the_smoother_fills_in_what_the_settings_leave_open(projected, name, default, other):
    backbone = backbone_fields(SOURCES["llama"])
    for given, used in ((None, default), (other, other)):
        assert lean_memory(backbone, {"ssm_projected": projected, name: given})[name] == used
    assert lean_memory(backbone, {"ssm_projected": projected})[name] == default


def test_the_size_of_the_state_changes_nothing_before_training(tmp_path):
    """The smoother reads one state channel: the same outputs with 2 and with 9, far beyond the window."""
    save_source(tmp_path / "source")
    outputs = []
    for state in (2, 9):
        assert graft(tmp_path, output=f"state-{state}", ssm_state_size=state) == 0
        outputs.append(logits(BMojoForCausalLM.from_pretrained(tmp_path / f"state-{state}"), 6 * W))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


def test_a_graft_with_and_without_projections_is_the_same_model(tmp_path):
    """Far beyond the window: equal logits, and every layer keeps the same tokens."""
    save_source(tmp_path / "source")
    models = []
    for output, settings in (("lean", {}), ("projected", {"ssm_projected": True})):
        assert graft(tmp_path, output=output, **settings) == 0
        models.append(BMojoForCausalLM.from_pretrained(tmp_path / output))
    lean, projected = models
    assert lean.num_parameters() == projected.num_parameters() - 2 * 2 * 32 * 32  # 2 layers, 2 products
    assert not any("out_proj" in name for name in lean.state_dict())
    torch.testing.assert_close(logits(lean, 6 * W), logits(projected, 6 * W), atol=1e-4, rtol=0)
    ids = torch.randint(3, VOCAB, (2, 6 * W), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        caches = [model(input_ids=ids).past_key_values for model in models]
    for layer in range(2):
        for row in range(2):
            kept = [[token.position for token in cache.remembered(layer, row)] for cache in caches]
            assert kept[0] == kept[1] and len(kept[0]) == 4


@pytest.mark.parametrize("projected", [False, True])
def test_smoother_lets_a_gradient_reach_every_tensor(projected):
    config = smoother_config(projected)
    model = BMojoForCausalLM(config)
    for layer in model.model.layers:
        layer.fading.load_state_dict(smoother(config, {}))
    ids = torch.randint(3, VOCAB, (1, 3 * W))
    model(input_ids=ids, labels=ids).loss.backward()
    fading = model.model.layers[0].fading
    for name, parameter in fading.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    states = 2 * config.ssm_state_size
    rows = {**({"x": 32} if projected else {}), "B": states, "C": states, "dt": 4}
    parts = dict(zip(rows, fading.in_proj.weight.grad.split(list(rows.values()))))
    assert all(part.abs().max() > 0 for part in parts.values()), {
        name: part.abs().max() for name, part in parts.items()
    }


def test_smoother_refuses_a_config_that_it_cannot_honour():
    with pytest.raises(ValueError, match=r"ssm_gated=True.*needs ssm_gated=False"):
        smoother(BMojoConfig(hidden_size=32, num_attention_heads=4, **{**SMOOTHER_FIELDS, "ssm_gated": True}), {})


# Every field has a home ----------------------------------------------------------------------------------------------
def homeless(names: Iterable[str], families: Iterable[Family] = FAMILIES) -> set[str]:
    """Backbone fields that no family reads from a source or fixes: a graft would leave them at their default."""
    homes = set(COMMON_FIELDS).union(*({*row.fields, *row.optional_fields, *row.constants} for row in families))
    return set(names) - homes


def test_every_backbone_field_has_a_home_in_the_table_of_families():
    names = BMojoConfig.fields_with(role="backbone")
    assert homeless(names) == set()
    assert homeless([*names, "new_field"]) == {"new_field"}
    assert "qk_norm" in homeless(names, [row for row in FAMILIES if "qk_norm" not in row.constants])


def test_the_table_of_families_names_backbone_fields_only():
    names = set(BMojoConfig.fields_with(role="backbone"))
    for row in FAMILIES:
        assert {*COMMON_FIELDS, *row.fields, *row.optional_fields, *row.constants} <= names, row.name


def test_every_field_has_one_role():
    own = [name for name in BMojoConfig.__annotations__ if name in BMojoConfig.__dataclass_fields__]
    roles = [name for role in ("backbone", "memory", "speed") for name in BMojoConfig.fields_with(role=role)]
    assert sorted(own) == sorted(roles) and sorted(BMojoConfig.fields_with()) == sorted(own)
    assert set(MEMORY_FIELDS) == set(own) - set(BMojoConfig.fields_with(role="backbone")) - set(OTHER_FIELDS)
