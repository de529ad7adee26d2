"""Which layers are converted: patterns, and measured layers against grafts that are made one by one."""

import json
import sys

import pytest
import torch
from transformers import Qwen2Config

from conversion.common.running import assembled
from conversion.data.texts import read_texts, sequences
from conversion.grafting.families import bmojo_config_for, chosen_layers
from conversion.grafting.layer_choice import RANKING_FILE, RANKING_PLOT, rank_layers
from conversion.grafting.report import read_report
from conversion.grafting.sources import open_source
from modeling_bmojo import BMojoForCausalLM
from tests.conversion.evaluation_sources import CHARACTERS, READER, save_reader
from tests.conversion.graft_sources import SOURCES, W, graft, logits, randomised, save_source


TOKENS, TEXTS = 96, 2
# Layer 0 attends to everything, the others slide. Qwen2's own tokenizer class adds a token to the characters.
SLIDING = Qwen2Config(
    vocab_size=len(CHARACTERS) + 1,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    use_sliding_window=True,
    sliding_window=W,
    max_window_layers=1,
)
MEASURED = {"layers": "measured", "measured_layers": 1, "measured_tokens": TOKENS, "measured_texts": TEXTS}


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ([4, 1], [1, 4]),
        ("every 1", [0, 1, 2, 3, 4]),
        ("every 2", [0, 2, 4]),
        ("every 2 from 1", [1, 3]),
        ("every 3 from 4", [4]),
        ("every 9", [0]),
    ],
)
def test_layers_as_given_or_by_pattern(layers, chosen):
    assert chosen_layers(layers, 5) == chosen


@pytest.mark.parametrize("layers", ["every 0", "every 2 from 5", "every -1", "every", "every 2 from", "every 2 ", 3])
def test_other_patterns_are_refused(layers):
    with pytest.raises(ValueError, match="every 2 from 1"):
        chosen_layers(layers, 5)


def test_a_pattern_goes_through_the_program(tmp_path):
    save_reader(tmp_path / "source")
    assert graft(tmp_path, layers="every 2") == 0
    assert read_report(tmp_path / "graft")["layers"] == [0, 2]
    model = BMojoForCausalLM.from_pretrained(tmp_path / "graft")
    assert model.config.layer_types == ["bmojo", "full_attention", "bmojo"]


@torch.no_grad()
def naive_nll(model: torch.nn.Module, texts: list[torch.Tensor], window: int) -> float:
    """Mean NLL of the tokens with more than `window` before them, each text in one forward without a cache."""
    means = []
    for ids in texts:
        chances = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        means.append(sum(-chances[t - 1, ids[0, t]].item() for t in range(window + 1, TOKENS)) / (TOKENS - 1 - window))
    return sum(means) / len(means)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_measured_layers_are_those_of_grafts_made_one_by_one(kind, tmp_path):
    config = READER if kind == "full" else SLIDING
    source = save_reader(tmp_path / "source", config)
    assert graft(tmp_path, **{**MEASURED, "measured_layers": 2}) == 0
    ranking = read_report(tmp_path / "graft")["layer_ranking"]

    tokenizer = open_source(str(tmp_path / "source")).tokenizer()
    texts = sequences(tokenizer, read_texts("pydoc", split="training"), TOKENS, TEXTS)
    base, harm = naive_nll(source, texts, W), []
    for index in range(3):
        assert graft(tmp_path, output=f"alone{index}", layers=[index]) == 0
        alone = BMojoForCausalLM.from_pretrained(tmp_path / f"alone{index}").eval()
        harm.append(naive_nll(alone, texts, W) - base)
    assert ranking["source_nll"] == pytest.approx(base, abs=1e-5)
    assert ranking["harm"] == pytest.approx(harm, abs=1e-5)
    order = sorted(range(3), key=lambda index: harm[index])
    assert len({round(value, 4) for value in harm}) == 3, "a ranking of equals would test nothing"
    assert ranking["order"] == order and ranking["chosen"] == sorted(order[:2])

    model = BMojoForCausalLM.from_pretrained(tmp_path / "graft")
    grafted = [index for index, kind in enumerate(model.config.layer_types) if kind == "bmojo"]
    assert grafted == ranking["chosen"] == read_report(tmp_path / "graft")["layers"]
    assert json.loads((tmp_path / "graft" / RANKING_FILE).read_text()) == ranking
    assert (tmp_path / "graft" / RANKING_PLOT).read_bytes().startswith(b"\x89PNG")


def test_swapping_leaves_the_source_and_loads_nothing_again(tmp_path):
    source = randomised(SOURCES["qwen2_mixed"])
    config = bmojo_config_for(source.config, {"window_size": W, "eidetic_size": 3})
    graft_model = BMojoForCausalLM(config)
    graft_model.load_state_dict(source.state_dict(), strict=False)
    model = assembled(config, graft_model.state_dict())
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    texts = [torch.randint(3, 96, (1, 3 * W))]
    found = rank_layers(model, ["full_attention", "sliding_attention"], texts)
    assert set(found) == {"source", 0, 1} and len(set(map(tuple, found.values()))) == 3
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    torch.testing.assert_close(logits(model, 4 * W), logits(source, 4 * W), atol=1e-5, rtol=1e-5)


def test_an_unchanged_measured_graft_is_kept(tmp_path, capsys):
    save_reader(tmp_path / "source")
    assert graft(tmp_path, **MEASURED) == 0
    capsys.readouterr()
    assert graft(tmp_path, "--reuse", **MEASURED) == 0
    assert "kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"measured_layers": None}, ["measured_layers=None", "number of layers"]),
        ({"layers": "all"}, ["layers='all'", "measured_layers=1"]),
        ({"measured_layers": 0}, ["measured_layers=0", "positive"]),
        ({"measured_layers": 4}, ["measured_layers=4", "3 layers"]),
        ({"measured_tokens": W + 1}, ["measured_tokens=17", "window_size=16"]),
        ({"measured_tokens": 513}, ["measured_tokens=513", "512 positions"]),
        ({"measured_texts": 10**6}, ["texts=1000000", "tokens"]),
        ({"measured_files": ["absent*.txt"]}, ["absent*.txt", "no file"]),
        ({"measured_files": "book.txt"}, ["measured_files='book.txt'", "list"]),
    ],
)
def test_bad_measuring_is_refused_before_any_work(settings, words, tmp_path, capsys):
    save_reader(tmp_path / "source")
    assert graft(tmp_path, **{**MEASURED, **settings}) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["settings.yaml", "source"]


def test_measuring_needs_a_tokenizer_and_matplotlib(tmp_path, capsys, monkeypatch):
    save_source(tmp_path / "source")
    assert graft(tmp_path, **MEASURED) == 2
    assert "no tokenizer" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert graft(tmp_path, **MEASURED) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "graft").exists()
