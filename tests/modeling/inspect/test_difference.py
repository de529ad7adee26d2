"""first_difference: silent where runs agree, and right about layer and state where something is broken."""

import pytest
import torch

from modeling_bmojo import BMojoForCausalLM, first_difference
from modeling_bmojo.eidetic_bmojo import EideticMemory
from modeling_bmojo.innovation_bmojo import KeyInnovation
from tests.modeling.test_cache import STATES, build, tokens
from tests.tiny import MIXED_LAYERS


PIECES = [None, [12, 18], [1] * 30, [4, 1, 9, 1, 15]]


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("name", STATES)
def test_there_is_none_where_a_text_is_cut_otherwise(name, pieces):
    assert first_difference(build(name), tokens(30), pieces=pieces) is None


@pytest.mark.parametrize("name", STATES)
def test_there_is_none_with_pads(name):
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[0, :13], mask[1, 5:9], mask[2, 28:] = 0, 0, 0
    assert first_difference(build(name), tokens(30), mask) is None


def broken_in(index, method, cls, monkeypatch, model):
    """`method` of the layer's part or test does nothing."""
    memory = model.model.layers[index].self_attn.memory
    owner = memory.innovation if cls is KeyInnovation else memory.part(cls)
    monkeypatch.setattr(owner, method, lambda *args, **kwargs: torch.zeros(3, dtype=torch.int64))


def test_it_names_the_layer_whose_step_forgets_the_wrong_token(monkeypatch):
    model = build(num_hidden_layers=3)
    broken_in(1, "_forgotten", EideticMemory, monkeypatch, model)
    found = first_difference(model, tokens(30), pieces=[29, 1])
    assert (found.layer, found.pieces) == (1, [29, 1]) and found.size > 1e-6
    assert found.state in ("output", "positions", "keys")


def test_it_names_a_state_that_is_not_moved_on(monkeypatch):
    """The last step writes a wrong state and no output shows it: only the states tell."""
    model = build(num_hidden_layers=3, innovation="key")
    score = KeyInnovation.score

    def forgets(self, signal, lengths, layer, kernels):
        before = None if layer is None else layer.key_sum.clone()
        surprise = score(self, signal, lengths, layer, kernels)
        if signal.shape[1] == 1 and self is model.model.layers[2].self_attn.memory.innovation:
            layer.key_sum.copy_(before)
        return surprise

    monkeypatch.setattr(KeyInnovation, "score", forgets)
    found = first_difference(model, tokens(30), pieces=[29, 1])
    assert (found.layer, found.state, found.column) == (2, "key_sum", None)


def test_it_names_the_first_column_of_an_output(monkeypatch):
    model = build(**MIXED_LAYERS)
    index = model.config.layer_types.index("linear_attention")
    conv = model.model.layers[index].fading.conv
    forward = type(conv).forward
    monkeypatch.setattr(conv, "forward", lambda x, history=None, first=0: forward(conv, x, None, first))
    found = first_difference(model, tokens(30), pieces=[20, 10])
    assert (found.layer, found.state, found.column) == (index, "output", 20)


def test_a_cached_run_that_differs_from_the_uncached_one(monkeypatch):
    """Read at once, with a cache and without: pieces is None."""
    model = build(num_hidden_layers=2)
    layer = model.model.layers[1]
    mix = type(layer).mix
    monkeypatch.setattr(
        layer, "mix", lambda h, rows, cache=None: (mix(layer, h, rows, cache)[0] * (1 + (cache is None)), None)
    )
    found = first_difference(model, tokens(30))
    assert (found.layer, found.state, found.column, found.pieces) == (1, "output", 0, None)


@pytest.mark.parametrize("pieces", [[29], [30, 0], [31], [15.0, 15], []], ids=str)
def test_pieces_of_another_text_are_refused(pieces):
    with pytest.raises(ValueError, match=r"pieces=.*sum 30"):
        first_difference(build(), tokens(30), pieces=pieces)


def test_other_types_have_a_tolerance_of_their_own():
    model = build()
    model = BMojoForCausalLM(model.config).float().eval()
    assert first_difference(model, tokens(30)) is None
    assert first_difference(model, tokens(30), tolerance=0.0) is not None


@pytest.mark.parametrize("where", ["output", "state"])
def test_a_nan_is_a_difference(monkeypatch, where):
    model = build(num_hidden_layers=2, innovation="key")
    if where == "output":
        layer = model.model.layers[1]
        mix = type(layer).mix
        nan = lambda h, rows, cache=None: (mix(layer, h, rows, cache)[0] * (1 if cache else torch.nan), None)  # noqa: E731
        monkeypatch.setattr(layer, "mix", nan)
        assert first_difference(model, tokens(30))[:2] == (1, "output")
        return
    score = KeyInnovation.score

    def poisoned(self, signal, lengths, layer, kernels):
        surprise = score(self, signal, lengths, layer, kernels)
        if signal.shape[1] == 1:
            layer.key_sum[:] = torch.nan
        return surprise.nan_to_num()

    monkeypatch.setattr(KeyInnovation, "score", poisoned)
    assert first_difference(model, tokens(30), pieces=[29, 1])[:2] == (0, "key_sum")


def test_positions_are_compared_exactly(monkeypatch):
    model = build().to(torch.bfloat16)
    step = EideticMemory._step

    def late(self, tokens, layer):
        observed = step(self, tokens, layer)
        layer.positions[layer.positions == 28] = 27
        return observed

    monkeypatch.setattr(EideticMemory, "_step", late)
    assert first_difference(model, tokens(30), pieces=[29, 1], tolerance=1e9)[:2] == (0, "positions")
