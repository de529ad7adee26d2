"""The models of an evaluation against dense masks: windows, sinks, the same bytes, and one copy of the weights."""

import copy

import pytest
import torch

from conversion.common.nll import read
from conversion.evaluation.baselines import Models, equal_memory_window
from conversion.evaluation.cost import cache_bytes
from conversion.grafting.families import bmojo_config_for
from conversion.grafting.pipeline import plan_graft
from conversion.grafting.settings import GraftSettings
from conversion.grafting.sources import open_source
from modeling_bmojo import BMojoForCausalLM
from tests.conversion.evaluation_sources import READER, dense_mask, save_reader
from tests.conversion.graft_sources import SOURCES, randomised, save_source


TOKENS = 60
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # transformers' norms and RoPE compute in float32 whatever the model's dtype


def models_of(folder, dtype=torch.float32, **settings) -> Models:
    settings = GraftSettings(source=str(folder), output="unwritten", **settings)
    return Models(plan_graft(settings, open_source(settings.source)), torch.device("cpu"), dtype)


def ids_of(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, 96, (1, tokens), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def masked_logits(source, ids, layers, window, sinks) -> torch.Tensor:
    """transformers' own model in float64, where only `layers` see through the dense mask."""
    source = copy.deepcopy(source).double()
    everything, narrow = dense_mask(ids.shape[1], None), dense_mask(ids.shape[1], window, sinks)
    for index, layer in enumerate(source.model.layers):
        mask = narrow if index in layers else everything
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )
    return source(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def logits_in_pieces(model, ids, chunk) -> torch.Tensor:
    cache, parts = None, []
    for piece in ids.split(chunk, dim=1):
        out = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("layers", ["all", [1]])
@pytest.mark.parametrize(("window", "sinks"), [(1, 1), (5, 1), (5, 4), (16, 4), (7, 40), (59, 2), (60, 3), (64, 4)])
def test_windows_and_sinks_are_those_of_a_dense_mask(window, sinks, layers, tmp_path):
    source = save_reader(tmp_path)
    models = models_of(tmp_path, memory={"window_size": window, "eidetic_decay": 0.1}, layers=layers)
    indices = range(3) if layers == "all" else layers
    ids = ids_of()
    for row, kept in ((models.window(window, "window"), 0), (models.sinks(sinks, window, "sinks"), sinks)):
        expected = masked_logits(source, ids, indices, window, kept)
        model = row.build().double()
        for chunk in (TOKENS, 13, 1):
            torch.testing.assert_close(logits_in_pieces(model, ids, chunk), expected, **CLOSE)


def test_the_mask_of_the_oracle_hides_something(tmp_path):
    source, ids = save_reader(tmp_path), ids_of()
    found = [masked_logits(source, ids, range(3), *mask) for mask in ((None, 0), (5, 0), (5, 4))]
    assert all((a - b).abs().max() > 1e-3 for a, b in ((found[0], found[1]), (found[1], found[2])))


@pytest.mark.parametrize(
    "name", ["llama_biases_tied", "qwen2", "qwen3", "smollm3", "llama3_rope", "phi3", "granite", "olmo2"]
)
def test_every_family_has_its_windows(name, tmp_path):
    source = save_source(tmp_path, name)
    row = models_of(tmp_path, memory={"window_size": 6}).sinks(3, 6, "sinks")
    expected = masked_logits(source, ids_of(), range(source.config.num_hidden_layers), 6, 3)
    torch.testing.assert_close(logits_in_pieces(row.build().double(), ids_of(), 11), expected, **CLOSE)


def test_the_source_reads_in_pieces_what_it_reads_at_once(tmp_path):
    source = save_reader(tmp_path)
    row = models_of(tmp_path).source()
    whole = source(input_ids=ids_of()).logits.detach()
    for chunk in (TOKENS, 7):
        torch.testing.assert_close(logits_in_pieces(row.build(), ids_of(), chunk), whole, atol=1e-4, rtol=1e-4)


def test_all_rows_share_one_copy_of_the_weights(tmp_path):
    save_reader(tmp_path)
    models = models_of(tmp_path, memory={"window_size": 5})
    rows = [models.window(5, "window"), models.window(9, "wide"), models.sinks(2, 5, "sinks"), models.fresh()]
    pointers = {row.build().model.layers[1].self_attn.q_proj.weight.data_ptr() for row in rows}
    assert len(pointers) == 1
    assert len({str(row.facts) for row in rows}) == len(rows), "each row has a fingerprint of its own"


def test_the_fresh_row_is_the_graft(tmp_path):
    save_reader(tmp_path)
    models = models_of(tmp_path, memory={"window_size": 8, "eidetic_size": 3})
    model = models.fresh().build()
    written = BMojoForCausalLM(models.plan.config)
    written.load_state_dict(models.tensors)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids_of()).logits, written.eval()(input_ids=ids_of()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", ["all", [0, 2]])
@pytest.mark.parametrize(("fading", "stride"), [(0, 1), (2, 1), (2, 4)])
def test_the_equal_window_has_the_bytes_of_a_cache_that_read(dtype, layers, fading, stride):
    """Counted on a real cache, far beyond the window: the largest window whose keys and values are not more bytes."""
    memory = {"window_size": 8, "eidetic_size": 3, "fading_size": fading, "fading_stride": stride}
    config = bmojo_config_for(READER, memory, layers)
    model = BMojoForCausalLM(config).to(dtype).eval()
    cache = read(model, ids_of(), 16).cache
    ours = [layer for layer in cache.layers if layer.spec.kind == "bmojo"]
    actual = sum(layer.nbytes - (0 if layer.last_hidden is None else layer.last_hidden.nbytes) for layer in ours)
    one_token = len(ours) * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    window = equal_memory_window(config, dtype)
    assert window * one_token <= actual < (window + 1) * one_token
    assert window > config.window_size


def test_cache_bytes_of_transformers_caches_are_keys_and_values():
    model = randomised(SOURCES["qwen2_mixed"])
    cache = read(model, ids_of(40), 40).cache
    assert cache_bytes(cache) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    ours = BMojoForCausalLM(bmojo_config_for(model.config, {})).eval()
    cache = read(ours, ids_of(40), 40).cache
    assert cache_bytes(cache) == cache.nbytes
