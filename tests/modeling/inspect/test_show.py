"""show_memory: pieces of text, what is remembered of each, and the pictures as HTML, coloured and plain text."""

import copy
import html
import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM, show_memory
from modeling_bmojo.inspect import show
from modeling_bmojo.inspect.pieces import token_pieces, visible
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, SLOTS, WINDOW


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a merge: every character beyond ASCII is several tokens."""
    core = Tokenizer(models.BPE({sign: index for index, sign in enumerate(sorted(ByteLevel.alphabet()))}, []))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: a word begins with U+2581, which the decoder drops at the start; bytes as <0x..>."""
    words = ["\u2581the", "\u2581cat", "\u2581", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core)


TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def build(**fields) -> BMojoForCausalLM:
    config = BMojoConfig(**{**SIZES, "vocab_size": 256, **fields})
    return randomize_(BMojoForCausalLM(config).double()).eval()


def read(model, ids, mask=None) -> BMojoCache:
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=mask, use_cache=True).past_key_values


# Pieces --------------------------------------------------------------------------------------------------------------
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_pieces_are_the_text_and_every_character_is_whole(text):
    ids = encode(text)
    pieces = token_pieces(TOKENIZER, ids)
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(ids)
    assert [piece.first for piece in pieces] == [sum(p.count for p in pieces[:i]) for i in range(len(pieces))]
    assert sum(piece.count for piece in pieces) == len(ids)
    if "\ufffd" not in text:
        assert [piece.text for piece in pieces] == list(text)


@pytest.mark.parametrize(("text", "counts"), [("a🔭b", [1, 4, 1]), ("ø山", [2, 3]), ("🔭🔭", [4, 4]), ("", [])])
def test_a_character_of_several_tokens_is_one_piece(text, counts):
    assert [piece.count for piece in token_pieces(TOKENIZER, encode(text))] == counts


def test_bytes_that_become_no_character_stay_alone():
    ids = encode("a🔭b")
    for broken in (ids[:3], ids[:3] + ids[5:], ids[:1] + ids[3:], ids[2:5]):
        pieces = token_pieces(TOKENIZER, broken)
        assert all(piece.count == 1 for piece in pieces)
        assert {piece.text for piece in pieces} <= {"a", "b", "\ufffd"}
    text = "\ufffd🔭"  # the sign itself may be in a text
    assert "🔭" in [piece.text for piece in token_pieces(TOKENIZER, encode(text))]


def test_spaces_that_a_decoder_drops_are_put_back():
    tokenizer = sentencepiece_tokenizer()
    ids = [0, 1, 3, 1, 4 + 0xC3, 4 + 0xB8, 0]
    assert [piece.text for piece in token_pieces(tokenizer, ids)] == ["the", " cat", "s", " cat", "ø", " the"]


def test_whitespace_and_control_characters_are_seen():
    assert visible("a b\n\tc   d") == "a b⏎\n⇥\tc···d"
    assert visible("\x1b[31m\r\x00\u202e\u200b\x85") == r"\x1b[31m\r\x00\u202e\u200b\x85"
    assert visible("a 👩\u200d🔬 שלום") == "a 👩\u200d🔬 שלום"


# What is remembered --------------------------------------------------------------------------------------------------
TEXT = "<b>5 & 6</b> 🔭 the cat\n\tsat on   the mat, Tromsø."


def expected_states(cache, row, layers) -> list[tuple[str, tuple[int, ...]]]:
    seen, window = int(cache.seen[row]), cache.specs[layers[0]].window
    states = []
    for position in range(seen):
        keep = [i for i in layers if cache.specs[i].slots and position in dict(cache.remembered(i, row))]
        states.append(("window" if position >= seen - window else "kept" if keep else "forgotten", tuple(keep)))
    return states


@pytest.mark.parametrize("layer", [None, 0, 1, -1])
@pytest.mark.parametrize("count", [1, WINDOW - 1, WINDOW, WINDOW + 1, 24, None])
def test_every_token_is_shown_as_it_is_remembered(count, layer):
    ids = encode(TEXT.replace("🔭", "").replace("ø", "o"))[:count]  # one token, one character
    cache = read(build(), [ids])
    view = show_memory(cache, TOKENIZER, ids, layer=layer)
    (row,) = view.rows
    found = [(token.state, token.layers) for token in row.tokens]
    assert found == expected_states(cache, 0, [0, 1] if layer is None else [layer % 2])
    states = [state for state, _ in found]
    assert (row.window, row.kept, row.forgotten) == tuple(map(states.count, ("window", "kept", "forgotten")))
    assert row.seen == len(ids) == row.window + row.kept + row.forgotten
    kept = {i: dict(cache.remembered(i)) for i in (0, 1)}
    for token in row.tokens:
        assert token.innovation == max((kept[i][token.position] for i in token.layers), default=None)


def test_a_character_counts_as_its_best_remembered_token():
    ids = encode("🔭" * 8)
    cache = read(build(eidetic_size=3), [ids])
    single = expected_states(cache, 0, [0, 1])
    (row,) = show_memory(cache, TOKENIZER, ids).rows
    assert [token.text for token in row.tokens] == ["🔭"] * 8
    for token in row.tokens:
        parts = single[token.position : token.position + token.tokens]
        assert token.layers == tuple(sorted({layer for _, layers in parts for layer in layers}))
        best = min(("window", "kept", "forgotten").index(state) for state, _ in parts)
        assert token.state == ("window", "kept", "forgotten")[best]
    assert row.kept == sum(state == "kept" for state, _ in single)
    assert any(token.state == "kept" for token in row.tokens)


def test_padded_rows_are_shown_as_each_alone():
    model = build()
    rows = [encode(TEXT), encode("Lorem ipsum dolor"), encode("a")]
    width = max(map(len, rows))
    for side in ("left", "right"):
        pads = [[7] * (width - len(row)) for row in rows]
        padded = [pad + row if side == "left" else row + pad for pad, row in zip(pads, rows)]
        holes = [([0] * len(pad), [1] * len(row)) for pad, row in zip(pads, rows)]
        mask = torch.tensor([a + b if side == "left" else b + a for a, b in holes])
        view = show_memory(read(model, padded, mask), TOKENIZER, torch.tensor(padded), attention_mask=mask)
        for index, row in enumerate(rows):
            (alone,) = show_memory(read(model, [row]), TOKENIZER, row).rows
            for ours, theirs in zip(view.rows[index].tokens, alone.tokens, strict=True):
                assert ours[:5] == theirs[:5]
            (chosen,) = show_memory(
                read(model, padded, mask), TOKENIZER, padded, attention_mask=mask, row=index - 3
            ).rows
            assert (chosen.row, chosen.tokens) == (index, view.rows[index].tokens)


def test_after_generate_the_last_token_is_unread():
    model, prompt = build(), torch.tensor([[7, 7, *encode("Lorem ipsum")], encode("dolor sit ame")])
    mask = (prompt != 7).long()
    out = model.generate(
        prompt, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, pad_token_id=7
    )
    view = show_memory(out.past_key_values, TOKENIZER, out.sequences, attention_mask=mask)
    for row, real in zip(view.rows, (11, 13)):
        assert row.seen == real + 3
        assert row.tokens[-1].state == "unread"
        assert [token.state for token in row.tokens].count("unread") == 1


def test_looking_changes_nothing():
    model, ids = build(**MIXED_LAYERS), encode(TEXT)
    cache = read(model, [ids])
    before = copy.deepcopy(cache)
    str(show_memory(cache, TOKENIZER, ids)), show_memory(cache, TOKENIZER, ids, layer=0)._repr_html_()
    for ours, theirs in zip(cache.layers, before.layers, strict=True):
        assert ours.columns == theirs.columns and ours.states().keys() == theirs.states().keys()
        assert all(torch.equal(value, theirs.states()[name]) for name, value in ours.states().items())
    with torch.no_grad():
        more = torch.tensor([encode("go on")])
        assert torch.equal(model(more, past_key_values=cache).logits, model(more, past_key_values=before).logits)


# Pictures ------------------------------------------------------------------------------------------------------------
class TextOf(HTMLParser):
    """The text under every tag of a class, whitespace signs left out."""

    def __init__(self, fragment: str):
        super().__init__()
        self.open, self.texts, self.tags = [], {}, []
        self.feed(fragment)
        assert self.open == [], "unbalanced tags"

    def handle_starttag(self, tag, attributes):
        self.open.append((tag, dict(attributes).get("class", "")))
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        inside = " ".join(name for _, name in self.open)
        self.texts[inside] = self.texts.get(inside, "") + ("" if self.open[-1][0] == "s" else data)


def test_html_is_escaped_complete_and_without_scripts():
    text = '<script>alert("1")</script>\n  & \x1b[0m' + TEXT
    ids = encode(text)
    fragment = show_memory(read(build(), [ids]), TOKENIZER, ids)._repr_html_()
    parsed = TextOf(fragment)
    assert "script" not in parsed.tags and {"mark", "style"} <= set(parsed.tags)
    body = fragment[fragment.index('<div class="text"') :]
    shown = html.unescape(re.sub(r"<[^<>]*>", "", body))
    assert shown == visible(text)
    assert "http" not in fragment and "@import" not in fragment and "url(" not in fragment


def test_text_and_colours_carry_the_same_words():
    ids = encode(TEXT)
    view = show_memory(read(build(), [ids]), TOKENIZER, ids)
    plain = view.to_text()
    assert f"the last {WINDOW} tokens ---" in plain and "\x1b" not in plain
    body = plain.partition("says\n\n")[2].replace(f"\n\n--- the window: the last {WINDOW} tokens ---\n\n", "")
    assert re.sub(r"⟦(.*?)⟧[⁰¹²³⁴⁵⁶⁷⁸⁹]+", r"\1", body, flags=re.DOTALL) == visible(TEXT)
    kept = "".join(token.text for token in view.rows[0].tokens if token.state == "kept")
    assert "".join(re.findall(r"⟦(.*?)⟧", body, flags=re.DOTALL)) == visible(kept).replace("⏎\n", "⏎")
    coloured = view.to_ansi()
    words = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert words.endswith(visible(TEXT))
    for line in coloured.splitlines():
        assert line.count("\x1b[48") == line.count("\x1b[0m"), "a background must not cross a line end"


def test_a_terminal_gets_colours_unless_it_wants_none(monkeypatch):
    ids = encode(TEXT)
    view = show_memory(read(build(), [ids]), TOKENIZER, ids)
    assert str(view) == repr(view) == view.to_text()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert str(view) == view.to_ansi()
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(view) == view.to_text()


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 30])
def test_levels_follow_the_legend(layers):
    view = show.MemoryView([], list(range(layers)), 4, layers, None)
    legend = dict(view.legend())
    for count in range(1, layers + 1):
        token = show.ShownToken("x", 0, 1, "kept", tuple(range(count)), 1.0)
        meaning = legend[view.level(token)]
        numbers = [int(n) for n in re.findall(r"\d+", meaning)][:-1] or [1]
        assert layers == 1 or numbers[0] <= count <= numbers[-1], meaning


def luminance(colour: tuple[float, float, float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def of_hex(text: str) -> tuple[float, float, float]:
    return tuple(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))


def of_xterm(number: int) -> tuple[float, float, float]:
    steps = (0, 95, 135, 175, 215, 255)
    number -= 16
    return tuple(steps[number // 6**power % 6] / 255 for power in (2, 1, 0))


def palettes() -> list:
    pages = [{n: tuple(map(of_hex, pair)) for n, pair in page.items()} for page in (show.LIGHT, show.DARK)]
    return [*pages, {name: tuple(map(of_xterm, pair)) for name, pair in show.TERMINAL.items()}]


@pytest.mark.parametrize("palette", palettes(), ids=["light", "dark", "terminal"])
def test_every_text_has_contrast_and_states_differ_for_all_eyes(palette):
    for name, (ground, ink) in palette.items():
        low, high = sorted((luminance(ground), luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name
    # Machado et al. 2009, severity 1, applied to the encoded values: how far apart two grounds remain.
    eyes = {
        "all": torch.eye(3).tolist(),
        "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    }
    for eye, matrix in eyes.items():
        window = torch.tensor(matrix) @ torch.tensor(palette["window"][0])
        for level in range(1, 5):
            kept = torch.tensor(matrix) @ torch.tensor(palette[f"kept{level}"][0])
            assert (window - kept).abs().max() > 0.1, (eye, level)


# Refusals ------------------------------------------------------------------------------------------------------------
def test_what_does_not_fit_is_refused():
    model, ids = build(**MIXED_LAYERS), encode(TEXT)
    cache = read(model, [ids, ids])
    both = [ids, ids]
    cases = [
        (dict(layer=4), "layer=4: the cache has 4 layers"),
        (dict(layer=2), "layer=2: full_attention layers have no window"),
        (dict(layer=-1), "layer=-1: linear_attention layers have no window"),
        (dict(row=2), "row=2: the cache has 2 rows"),
        (dict(input_ids=ids), "input_ids: 1 rows but the cache has 2"),
        (dict(input_ids=[ids[:-1]] * 2), f"{len(ids) - 1} real tokens but the cache has read {len(ids)}"),
        (dict(input_ids=[]), r"input_ids: must be \[batch, tokens\]"),
        (dict(attention_mask=torch.ones(2, len(ids) + 1)), "columns for"),
        (dict(attention_mask=[[0] + [1] * (len(ids) - 1)] * 2), "real tokens but the cache has read"),
    ]
    for options, said in cases:
        with pytest.raises(ValueError, match=said):
            show_memory(cache, TOKENIZER, **{"input_ids": both, **options})
    with pytest.raises(ValueError, match="cache: is empty"):
        show_memory(BMojoCache(model.config), TOKENIZER, ids)
    mask = torch.ones(2, len(ids))
    mask[0, :3] = 0
    with pytest.raises(ValueError, match=f"row 0 has 3 pads among its {len(ids)} columns; pass the mask"):
        show_memory(read(model, both, mask), TOKENIZER, both)
    for kind in ("full_attention", "linear_attention"):
        with pytest.raises(ValueError, match=f"{kind} layers have no window"):
            show_memory(read(build(layer_types=[kind] * 2), both), TOKENIZER, both)


def test_layers_without_slots_show_the_window_alone():
    ids = encode(TEXT)
    for fields in (dict(eidetic_size=0), dict(layer_types=["sliding_attention"] * 2)):
        (row,) = show_memory(read(build(**fields), [ids]), TOKENIZER, ids).rows
        assert (row.window, row.kept) == (WINDOW, 0)
    assert SLOTS > 0
