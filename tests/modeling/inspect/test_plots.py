"""Innovation traces against what a cache holds at every moment, bytes against caches that exist, and the diagrams."""

import copy
import sys

import matplotlib
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_bmojo import (
    BMojoCache,
    BMojoConfig,
    BMojoForCausalLM,
    plot_expiry,
    plot_innovation,
    plot_memory_growth,
    trace_innovation,
)
from modeling_bmojo.inspect import plots
from modeling_bmojo.inspect.trace import held_tokens, measure_bytes, memory_bytes
from modeling_bmojo.memory_ops import NEVER
from tests.modeling.inspect.test_show import TOKENIZER, encode
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, UNPROJECTED, WINDOW


matplotlib.use("Agg")
LENGTH = 6 * WINDOW + 2
MODELS = {
    "output": {},
    "state": dict(innovation="state"),
    "decay": dict(eidetic_decay=0.05),
    "mixed": MIXED_LAYERS,
    "unprojected": UNPROJECTED,
    "s6": dict(ssm_type="mamba"),
    "no fading tokens": dict(fading_size=0),
}


def build(**fields) -> BMojoForCausalLM:
    config = BMojoConfig(**{**SIZES, "vocab_size": 256, **fields})
    return randomize_(BMojoForCausalLM(config).double()).eval()


def tokens(count=LENGTH, batch=2):
    return torch.randint(0, 256, (batch, count), generator=torch.Generator().manual_seed(1))


def read(model, ids, **options) -> BMojoCache:
    with torch.no_grad():
        return model(ids, use_cache=True, **options).past_key_values


# Traces --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_a_trace_is_what_the_cache_holds_and_sees_at_every_moment(name):
    model, ids = build(**MODELS[name]), tokens()
    trace = trace_innovation(model, ids)
    assert trace.innovations.isfinite().all() and trace.innovations.shape == (len(trace.layers), *ids.shape)
    for count in range(1, LENGTH + 1):
        cache = read(model, ids[:, :count])
        for index, layer in enumerate(trace.layers):
            for row in range(2):
                positions, innovations = held_tokens(cache, layer, row)
                torch.testing.assert_close(trace.innovations[index, row, positions], innovations, rtol=1e-9, atol=1e-12)
                # The next query, at `count`, sees a token until its expiry; in the cache are those it may see.
                expiry = trace.expiry(layer, row)[: count - WINDOW + 1]
                beyond = [token.position for token in cache.remembered(layer, row)]
                alive = [s for s, end in enumerate(expiry.tolist()) if s < count - WINDOW and end > count - 1]
                assert beyond == alive, (count, layer, row)
    for index, layer in enumerate(trace.layers):
        for row in range(2):
            kept = trace.kept[index, row].nonzero().flatten().tolist()
            assert kept == [token.position for token in trace.cache.remembered(layer, row)]
            assert kept == [token.position for token in cache.remembered(layer, row)]


def test_traces_of_padded_rows_are_those_of_each_alone():
    model, ids = build(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    trace = trace_innovation(model, ids, mask)
    alone = trace_innovation(model, ids[:1, 7:])
    torch.testing.assert_close(trace.innovations[:, 0, : LENGTH - 7], alone.innovations[:, 0])
    assert trace.innovations[:, 0, LENGTH - 7 :].isnan().all() and not trace.kept[:, 0, LENGTH - 7 :].any()
    assert torch.equal(trace.kept[:, 0, : LENGTH - 7], alone.kept[:, 0])
    assert torch.equal(trace.expiry(0), alone.expiry(0))


@pytest.mark.parametrize("training", [True, False])
def test_tracing_leaves_the_model_as_it_was(training):
    model = build(attention_dropout=0.5).train(training)
    model.gradient_checkpointing_enable()
    model.lm_head.train(not training)
    before = copy.deepcopy(model.state_dict())
    first = trace_innovation(model, tokens())
    assert torch.equal(first.innovations, trace_innovation(model, tokens()).innovations)
    assert all(module.training is (training ^ (module is model.lm_head)) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_models_without_an_eidetic_memory_have_no_trace():
    for fields in (dict(eidetic_size=0), dict(layer_types=["full_attention", "linear_attention"])):
        with pytest.raises(ValueError, match="nothing measures innovations"):
            trace_innovation(build(**fields), tokens())
    trace = trace_innovation(build(**MIXED_LAYERS), tokens())
    with pytest.raises(ValueError, match=r"layer=1: measures no innovation; the layers that do are \[0\]"):
        trace.expiry(1)


# Bytes ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixed"])
def test_bytes_are_those_of_a_cache(name, dtype):
    model = build(**MODELS[name]).to(dtype)
    for count in (1, WINDOW, LENGTH):
        assert memory_bytes(model.config, count, dtype)[0] == read(model, tokens(count, batch=1)).nbytes
    assert measure_bytes(model, [1, WINDOW, LENGTH]) == [memory_bytes(model.config, 1, dtype)[0]] * 3


def test_bytes_of_full_attention_grow_by_what_is_read():
    model = build(**MIXED_LAYERS)
    held = read(model, tokens(LENGTH, batch=1))
    spare = held.layers[2].keys.shape[2] - LENGTH
    per_token = 2 * SIZES["num_key_value_heads"] * model.config.head_dim * 8
    assert memory_bytes(model.config, LENGTH, torch.float64)[0] == held.nbytes - spare * per_token


def test_bytes_of_a_transformer_are_those_of_transformers_cache():
    config = build().config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    llama = LlamaForCausalLM(
        LlamaConfig(**{name: getattr(config, name) for name in names}, num_key_value_heads=config.num_key_value_heads)
    )
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(tokens(batch=1), past_key_values=cache)
    held = sum(value.numel() * value.element_size() for layer in cache.layers for value in (layer.keys, layer.values))
    assert memory_bytes(config, LENGTH, torch.float32)[1] == held


# Diagrams ------------------------------------------------------------------------------------------------------------
def test_innovation_diagrams_have_the_numbers():
    model, ids = build(), torch.tensor([encode("the cat sat on the mat and $x^2$ was 山🔭 here")])
    trace = trace_innovation(model, ids)
    (ax,) = plot_innovation(trace, layer=1, tokenizer=TOKENIZER, input_ids=ids).axes
    torch.testing.assert_close(torch.tensor(ax.lines[0].get_ydata()), trace.innovations[1, 0])
    dots = ax.collections[0].get_offsets()
    assert dots[:, 0].tolist() == trace.kept[1, 0].nonzero().flatten().tolist()
    assert ax.get_yscale() == "log"
    (ax,) = plot_innovation(trace, tokenizer=TOKENIZER, input_ids=ids, labels=3).axes
    torch.testing.assert_close(torch.tensor(ax.lines[0].get_ydata()), trace.innovations[:, 0].mean(0))
    assert len([text for text in ax.texts if text.get_text() != "window "]) <= 3
    (ax,) = plot_innovation(trace.cache, layer=0).axes
    tops = [segment[1] for segment in ax.collections[0].get_segments() if len(segment)]
    positions, innovations = held_tokens(trace.cache, 0, 0)
    found = {int(x): y for x, y in tops}
    assert found == pytest.approx(dict(zip(positions.tolist(), innovations.tolist())))


@pytest.mark.filterwarnings("error")
def test_diagrams_are_drawn_without_warnings_also_of_little_text(tmp_path):
    model = build()
    for count in (1, 2, WINDOW, 3 * WINDOW):
        ids = torch.tensor([encode("$山🔭 \n\t_the cat sat on")[:count]])
        trace = trace_innovation(model, ids)
        options = dict(tokenizer=TOKENIZER, input_ids=ids[0])
        figures = [plot_innovation(trace, **options), plot_innovation(trace.cache, layer=1, **options)]
        figures += [plot_expiry(trace, 0), plot_memory_growth(model, 64, measure=[1, 9])]
        for index, figure in enumerate(figures):
            assert isinstance(figure, matplotlib.figure.Figure)
            figure.savefig(tmp_path / f"{index}.png", dpi=40)


def test_expiry_diagram_draws_every_kept_token():
    trace = trace_innovation(build(), tokens(batch=1))
    (ax,) = plot_expiry(trace, 1).axes
    columns = ax.collections[1].get_segments()
    expiry = trace.expiry(1).tolist()
    expected = [
        (s, min(s + WINDOW, LENGTH), min(end, LENGTH) if end != NEVER else LENGTH)
        for s, end in enumerate(expiry)
        if end > s + WINDOW
    ]
    assert [(x, low, high) for (x, low), (_, high) in columns] == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0341, "0.0341"), (30.62, "30.6"), (99.96, "100"), (999.6, "1,000"), (1509.9, "1,510")],
)
def test_sizes_are_written_without_exponents(value, text):
    assert plots._short(value) == text


def test_growth_diagram_has_the_numbers():
    model = build().float()
    (ax,) = plot_memory_growth(model, 4096, measure=[3, 40]).axes
    theirs, ours, dots = (line.get_ydata() for line in ax.lines)
    assert (ours[-1], theirs[-1]) == tuple(value / 1e6 for value in memory_bytes(model.config, 4096))
    assert dots.tolist() == [ours[0]] * 2
    # The crossing that the title names is where one length more makes B'MOJO's memory the smaller one.
    crossing = int(ax.get_title(loc="left").split()[-2].replace(",", ""))
    for count, smaller in ((crossing, False), (crossing + 1, True)):
        ours, theirs = memory_bytes(model.config, count)
        assert (ours < theirs) == smaller


def test_colours_follow_the_ground_and_axes_may_be_given():
    import matplotlib.pyplot as plt

    config = build().config
    for style, dark in (("default", False), ("dark_background", True)):
        with plt.style.context(style):
            (ax,) = plot_memory_growth(config, 64).axes
            assert ax.lines[1].get_color() == plots.INKS[dark]["kept"]
    figure, ax = plt.subplots()
    assert plot_memory_growth(config, 64, ax=ax) is figure
    plt.close(figure)
    assert plt.get_fignums() == []


def test_what_cannot_be_drawn_is_refused(monkeypatch):
    model = build()
    trace = trace_innovation(model, tokens())
    cases = [
        (lambda: plot_innovation(trace, layer=7), "layer=7: measures no innovation"),
        (lambda: plot_innovation(trace, row=2), "row=2: the cache has 2 rows"),
        (lambda: plot_innovation(BMojoCache(model.config)), "the cache is empty"),
        (lambda: plot_memory_growth(torch.nn.Linear(2, 2)), "must be a B'MOJO model or BMojoConfig"),
        (lambda: plot_memory_growth(model, 1), "tokens=1: must be at least 2"),
        (lambda: plot_memory_growth(model.config, measure=[1]), "needs a model to read with"),
        (lambda: plot_memory_growth(model, measure=[2, 1]), "rising lengths"),
    ]
    for call, said in cases:
        with pytest.raises(ValueError, match=said):
            call()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"need matplotlib .*: pip install 'modeling-bmojo\[notebooks\]'"):
        plot_memory_growth(model)
