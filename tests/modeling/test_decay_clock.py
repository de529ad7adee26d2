"""Age counted in surprise: what an eidetic memory keeps when its scores fade by innovations instead of tokens.

The oracle holds E, the sum of all innovations so far, and evaluates every score at every comparison.
"""

import math

import pytest
import torch

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM, first_difference, trace_innovation
from modeling_bmojo.memory_ops import NEVER
from tests.oracles import randomize_
from tests.tiny import SIZES, VOCAB


pytestmark = pytest.mark.own_settings


def build(**fields):
    fields = dict(innovation="key", eidetic_decay=0.4, decay_clock="innovation") | fields
    torch.manual_seed(0)
    return randomize_(BMojoForCausalLM(BMojoConfig(**{**SIZES, **fields}))).double().eval()


def tokens(count, rows=1, seed=0):
    return torch.randint(0, VOCAB, (rows, count), generator=torch.Generator().manual_seed(seed))


def oracle(innovations, window, slots, decay, clock):
    """Positions kept at the end, and the query from which on each token is out of sight (inf: it is still seen).

    The score of token s when query t reads is e_s exp(-g (E_t - E_s)), or exp(-g (t - s)); ties: the older stays.
    """
    kept, expiry, total, sums = [], [math.inf] * len(innovations), 0.0, []
    for t, innovation in enumerate(innovations):
        total += innovation
        sums.append(total)
        leaving = t - window
        if leaving < 0:
            continue
        kept.append(leaving)
        if len(kept) > slots:
            ages = {s: sums[t] - sums[s] if clock == "innovation" else t - s for s in kept}
            loser = min(ages, key=lambda s: (innovations[s] * math.exp(-decay * ages[s]), -s))
            kept.remove(loser)
            expiry[loser] = t
    return kept, expiry


@pytest.mark.parametrize("decay", [0.05, 0.4, 3.0])
@pytest.mark.parametrize("innovation", ["output", "state", "key", "constant"])
@pytest.mark.parametrize("slots", [1, 3, 9])
def test_it_keeps_what_the_oracle_keeps(innovation, decay, slots):
    model = build(innovation=innovation, eidetic_decay=decay, eidetic_size=slots)
    ids = tokens(60, rows=2)
    trace = trace_innovation(model, ids)
    cache = BMojoCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
    for layer in range(2):
        for row in range(2):
            scores = trace.innovations[layer, row].tolist()
            kept, expiry = oracle(scores, 5, slots, decay, "innovation")
            assert [token.position for token in cache.remembered(layer, row)] == kept
            found = trace.expiry(layer, row).tolist()
            assert [at if at < 60 else math.inf for at in found] == expiry and max(found) <= NEVER
            assert float(cache.layers[layer].clock[row]) == pytest.approx(sum(scores), rel=1e-12)


@pytest.mark.parametrize("pieces", [[60], [1] * 60, [4, 1, 1, 30, 24], [59, 1], [5, 55], [6, 54]], ids=str)
def test_any_split_keeps_the_same(pieces):
    """Bit for bit: E is one sum from left to right however the text is cut."""
    model, ids, clocks = build(), tokens(60, rows=2), []
    assert first_difference(model, ids, pieces=pieces) is None
    for cut in ([60], pieces):
        cache, start = BMojoCache(model.config), 0
        with torch.no_grad():
            for size in cut:
                model(ids[:, start : start + size], cache=cache)
                start += size
        layer = cache.layers[0]
        order = layer.positions[:, layer.memory.parts[-1].own].argsort(dim=1)
        clocks.append((layer.clock, layer.clocks.gather(1, order)))
    torch.testing.assert_close(clocks[0], clocks[1], rtol=1e-14, atol=0)


def test_without_decay_the_clock_changes_nothing():
    found = []
    for clock in ("tokens", "innovation"):
        model = build(eidetic_decay=0.0, decay_clock=clock)
        with torch.no_grad():
            found.append(model(tokens(60)).logits)
    assert torch.equal(*found)


def test_steady_text_does_not_age_what_is_kept():
    """A change, then one token again and again: by the clock of tokens the memory fills with the last ones, by that of
    innovations what stood before the steady stretch stays."""
    steady = torch.cat([tokens(20), torch.full((1, 200), 7)], dim=1)
    for clock, stays in (("innovation", True), ("tokens", False)):
        model = build(decay_clock=clock, eidetic_decay=1.0, innovation="output", fading_size=0)
        cache = BMojoCache(model.config)
        with torch.no_grad():
            model(steady, cache=cache)
        kept = [token.position for token in cache.remembered(0)]
        assert (min(kept) < 22) == stays, (clock, kept)


def test_states_exist_only_where_they_are_needed():
    for fields in (dict(eidetic_decay=0.0), dict(decay_clock="tokens"), dict(eidetic_size=0)):
        names = BMojoCache(build(**fields).config).layers[0].names
        assert "clock" not in names and "clocks" not in names
    assert {"clock", "clocks"} <= set(BMojoCache(build().config).layers[0].names)


@pytest.mark.parametrize("value", ["surprise", None, 3])
def test_another_clock_is_refused(value):
    with pytest.raises(ValueError, match=r"decay_clock=.*must be one of \['tokens', 'innovation'\]"):
        build(decay_clock=value)


def test_a_damaged_clock_is_not_saved(tmp_path):
    model = build()
    cache = BMojoCache(model.config)
    with torch.no_grad():
        model(tokens(30), cache=cache)
    cache.layers[1].clock -= 100
    with pytest.raises(ValueError, match="layer 1: row 0: 'clocks' are negative or beyond 'clock'"):
        cache.save(tmp_path / "cache")
