"""Sketches of keys: the best ones by the definition, and of the keys and queries that the model itself sketches.

G key/value heads, D head dim, r sketch size, T tokens.
"""

import pytest
import torch

from conversion.common.sketch_fit import fit_pair, fit_sketches
from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from modeling_bmojo.attention_bmojo import BMojoAttention
from modeling_bmojo.sketch_bmojo import KeySketch
from tests.tiny import MIXED_LAYERS, SIZES, VOCAB


D = 4
STORED = {**SIZES, "storage_size": 3, "storage_sketch_size": 2}
HALF_ROPE = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
KINDS = {
    "grouped": {},
    "one head each": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True},
    "norm of heads": {"qk_norm": "head"},
    "norm of all": {"qk_norm": "full"},
    "half of RoPE": {"rope_parameters": HALF_ROPE},
    "scaled RoPE": {"rope_parameters": YARN},
    "a layer without RoPE": {"no_rope_layers": [0, 1]},
    "no RoPE": {"rope_parameters": None},
    "some layers": MIXED_LAYERS,
    "strided fading tokens": {"window_size": 6, "fading_stride": 2},
    "mass": {"fading_mass": True, "fading_stride": 2, "innovation": "key"},
    "far": {"max_rope_distance": 8, "storage_decay": 0.1, "storage_limit": 9},
}


def random_model(dtype: torch.dtype = torch.float32, **fields) -> BMojoForCausalLM:
    torch.manual_seed(3)
    model = BMojoForCausalLM(BMojoConfig(**{**STORED, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scalars" not in name:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.to(dtype)


def rows(count: int = 2, tokens: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(VOCAB, (1, tokens), generator=generator) for _ in range(count)]


def sketches_of(model) -> list[KeySketch]:
    attention = [getattr(layer, "self_attn", None) for layer in model.model.layers]
    return [each.sketch for each in attention if each is not None and each.sketch is not None]


class Asked:
    """Keys `[T, G, D]` and turned queries `[T, H, D]`, float64, that a model's own sketches are asked for."""

    def __init__(self, model, monkeypatch):
        self.keys, self.queries, self.scaling = {}, {}, None
        own_keys, own_queries = KeySketch.keys, KeySketch.queries

        def keys(sketch, value):
            self.keys.setdefault(id(sketch), []).append(value.double().flatten(0, 1))
            return own_keys(sketch, value)

        def queries(sketch, value, scaling):
            self.queries.setdefault(id(sketch), []).append(value.double().flatten(0, 1))
            self.scaling = scaling
            return own_queries(sketch, value, scaling)

        own_sketches = BMojoAttention._sketches

        def sketches(attention, *arguments):
            """Ask at once: the model asks where not all that is stored is fetched."""
            found, ask = own_sketches(attention, *arguments)
            ask()
            return found, ask

        monkeypatch.setattr(KeySketch, "keys", keys)
        monkeypatch.setattr(KeySketch, "queries", queries)
        monkeypatch.setattr(BMojoAttention, "_sketches", sketches)

    def of(self, sketch: KeySketch) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat(self.keys[id(sketch)]), torch.cat(self.queries[id(sketch)])


def product(fitted: dict[str, torch.Tensor]) -> torch.Tensor:
    """U P^T `[G, D, D]`: what a sketch knows, whatever the basis of its r numbers."""
    return fitted["query_projection"].double() @ fitted["key_projection"].double().mT


def moments(keys: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys less their mean, and both moments, in the plainest form."""
    offset = keys - keys.mean(0)
    groups, tokens = keys.shape[1], len(keys)
    per = queries.shape[1] // groups
    spread = torch.stack([sum(torch.outer(k, k) for k in offset[:, g]) / tokens for g in range(groups)])
    mine = [queries[:, g * per : (g + 1) * per].flatten(0, 1) for g in range(groups)]
    squares = torch.stack([sum(torch.outer(q, q) for q in part) / len(part) for part in mine])
    return offset, spread, squares


@pytest.mark.parametrize("kind", KINDS)
def test_fitted_to_what_the_model_sketches(kind, monkeypatch):
    """Keys and turned queries are those of the model's own forward, in every kind of attention."""
    model = random_model(**KINDS[kind])
    asked = Asked(model, monkeypatch)
    fitted = fit_sketches(model, rows(), 2)
    sketches = sketches_of(model)
    expected = [index for index, layer in enumerate(model.config.layer_types) if layer == "bmojo"]
    assert list(fitted) == expected and len(sketches) == len(expected)
    for sketch, found in zip(sketches, fitted.values()):
        keys, queries = asked.of(sketch)
        assert len(keys) == 80
        offset, spread, squares = moments(keys, queries)
        reference = fit_pair(offset, spread, squares, 2)
        torch.testing.assert_close(found["center"].double(), keys.mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(product(found), product(reference), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found["scale"], reference["scale"], atol=1e-4, rtol=1e-3)
        sketch.accept(**found)


def test_positions_of_the_queries_matter(monkeypatch):
    """RoPE at W and none differ in what is fitted, so the test above tells them apart."""
    model = random_model()
    before = fit_sketches(model, rows(), 2)[0]
    model.model.layers[0].self_attn.use_rope = False
    after = fit_sketches(model, rows(), 2)[0]
    assert (product(before) - product(after)).abs().max() > 0.01
    torch.testing.assert_close(before["center"], after["center"])


def test_no_other_pair_is_better():
    """Mean squared error over all pairs of a query and a key, against perturbed and random pairs, and PCA's."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    tokens, groups, size, rank = 60, 2, 8, 3
    keys = draw(tokens, groups, size) @ (draw(size, size) * torch.logspace(0, -1.5, size, dtype=torch.float64)) + 2.0
    queries = draw(2 * tokens, groups, size) @ draw(size, size) + 0.5
    offset = keys - keys.mean(0)
    spread = torch.einsum("tgd,tge->gde", offset, offset) / tokens
    squares = torch.einsum("tgd,tge->gde", queries, queries) / len(queries)
    fitted = fit_pair(offset, spread, squares, rank)
    left, right = fitted["query_projection"].double(), fitted["key_projection"].double()

    def error(query_projection, key_projection):
        exact = torch.einsum("qgd,kgd->gqk", queries, offset)
        asked = torch.einsum("qgd,gdr->gqr", queries, query_projection)
        kept = torch.einsum("kgd,gdr->gkr", offset, key_projection)
        return (exact - asked @ kept.mT).square().mean((1, 2))

    best = error(left, right)
    assert (best > 0).all()
    values = torch.linalg.eigvals(squares @ spread).real.sort(dim=-1, descending=True).values
    torch.testing.assert_close(best, values[:, rank:].sum(-1), rtol=1e-4, atol=0.0)
    for step in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(5):
            assert (error(left + step * draw(*left.shape), right) > best).all()
            assert (error(left, right + step * draw(*right.shape)) > best).all()
    directions = torch.linalg.eigh(spread).eigenvectors[..., -rank:]
    assert (error(directions, directions) > 1.05 * best).all()
    assert (error(torch.linalg.qr(draw(*left.shape))[0], right) > best).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_channels_give_the_scores_up_to_rounding(dtype, monkeypatch):
    """With r = D, x differs from sigma q (k - m) by the rounding of z to whole numbers alone."""
    model = random_model(dtype, storage_sketch_size=D)
    for index, found in fit_sketches(model, rows(), D).items():
        model.model.layers[index].self_attn.sketch.float().accept(**found)
    asked = Asked(model, monkeypatch)
    for row in rows():
        model(input_ids=row)
    for sketch in sketches_of(model):
        keys, queries = asked.of(sketch)
        center, scale = sketch.center.double(), sketch.scale.double()
        sketched = sketch.queries(queries[None], asked.scaling)[0].unflatten(1, (len(center), -1))
        z = sketch.keys(keys[None])[0].double()
        assert z.abs().amax() <= 127 and (z.abs().amax(0) >= 114).all()  # the range is used, with a tenth to spare
        found = torch.einsum("tgnr,sgr->gnts", sketched, z)
        by_group = queries.unflatten(1, (len(center), -1))
        exact = asked.scaling * torch.einsum("tgnd,sgd->gnts", by_group, keys - center)
        rounding = 0.5 * sketched.abs().sum(-1).permute(1, 2, 0)[..., None]
        # P and U are float32, bfloat16 keys are exact in it: what is left is of that order.
        assert ((found - exact).abs() <= 1.01 * rounding + 1e-2 * exact.std()).all()
        assert (found - exact).std() < 0.02 * exact.std()
        assert (scale > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_fewer_tokens_than_channels(tokens, dtype):
    """Moments without full rank leave finite numbers and positive scales, which the model accepts."""
    model = random_model(dtype, storage_sketch_size=3)
    for index, found in fit_sketches(model, rows(1, tokens), 3).items():
        assert all(value.isfinite().all() and value.dtype == torch.float32 for value in found.values())
        model.model.layers[index].self_attn.sketch.accept(**found)
    assert model(input_ids=rows(1)[0]).logits.isfinite().all()


def test_keys_that_never_vary():
    model = random_model()
    model.model.layers[0].self_attn.k_proj.weight.data.zero_()
    model.model.layers[1].self_attn.q_proj.weight.data.zero_()
    for index, found in fit_sketches(model, rows(), 2).items():
        assert all(value.isfinite().all() for value in found.values())
        model.model.layers[index].self_attn.sketch.accept(**found)


def test_rows_may_be_one_batch():
    model = random_model()
    apart, together = fit_sketches(model, rows(), 2), fit_sketches(model, [torch.cat(rows())], 2)
    for index, found in apart.items():
        torch.testing.assert_close(product(found), product(together[index]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["center"], together[index]["center"], atol=1e-6, rtol=1e-5)


def test_hooks_are_taken_away():
    model = random_model()
    with pytest.raises(ValueError, match="input_ids holds"):
        fit_sketches(model, [torch.tensor([[VOCAB + 1]])], 2)
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_refusals():
    with pytest.raises(ValueError, match="storage_size=0: no layer stores"):
        fit_sketches(random_model(storage_size=0), rows(), 2)
    with pytest.raises(ValueError, match=r"storage_sketch_size=5: must lie in \[1, head_dim=4\]"):
        fit_sketches(random_model(), rows(), 5)
    with pytest.raises(ValueError, match="hold no tokens"):
        fit_sketches(random_model(), [], 2)
    model = random_model()
    model.model.layers[0].self_attn.k_proj.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        fit_sketches(model, rows(), 2)
