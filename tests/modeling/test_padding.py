"""Pads take no part in anything and packed sequences do not see each other: every row equals itself alone, unpadded.

The matrix: {left, right, inner} pads x {one row, many} x {one prefill, chunks, a second turn, generate()}, outputs,
memories and gradients alike. Pads hold random token ids, so that what leaks shows. Rows overflow the eidetic memory.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM, BMojoForSequenceClassification
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, SLOTS, UNPROJECTED, VOCAB, WINDOW


pytestmark = pytest.mark.own_settings


PAD = 0
BASE = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "pad_token_id": PAD}
SETTINGS = {
    "output": {},
    "state-decay": dict(innovation="state", eidetic_decay=0.05, tie_fading_projections=False, fading_size=7),
    "stride": dict(window_size=6, fading_size=2, fading_stride=3),
    "answers": dict(innovation="key", fading_delay=0),
    "learnt": dict(innovation="key", innovation_gradient=3.0),
    "answers-stride": dict(window_size=4, fading_size=2, fading_stride=3, fading_delay=0),
    "key-decay": dict(innovation="key", eidetic_decay=0.05),
    "clock": dict(innovation="state", eidetic_decay=0.3, decay_clock="innovation"),
    "mixed-layers": MIXED_LAYERS,
    "unprojected": UNPROJECTED,
    "post-norm": dict(norm_position="post", qk_norm="full", residual_multiplier=0.5),
    "s6": dict(ssm_type="mamba", ssm_state_size=3, num_hidden_layers=1),
    "delta": dict(ssm_type="gated_delta", innovation="state", ssm_state_size=3, num_hidden_layers=1),
    "kalma": dict(ssm_type="kalmanet", innovation="state", ssm_state_size=3, ssm_solver_steps=5, num_hidden_layers=1),
}
PATTERNS = ("left", "right", "inner")
ROWS = {"one row": [31], "many": [40, 23, 6, 1]}  # real tokens per row
COLUMNS = 48


def build(name="output", cls=BMojoForCausalLM, **fields):
    config = BMojoConfig(**{**BASE, **SETTINGS[name], **fields})
    return randomize_(cls(config)).double().eval()


@functools.cache
def shared(name):
    """The model of a setting for tests that change nothing of it: what a row is alone, is computed once for all."""
    return build(name)


def sequences(lengths, seed=0):
    """One tensor of random ids per length; no id is the pad token's."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in lengths]


def pad(rows, pattern, columns=COLUMNS, seed=0):
    """Ids and mask [B, columns]: the rows with pads on the left, on the right, or anywhere before the last token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (len(rows), columns), generator=generator)
    mask = torch.zeros(len(rows), columns, dtype=torch.long)
    for row, real in enumerate(rows):
        if pattern == "left":
            mask[row, columns - len(real) :] = 1
        elif pattern == "right":
            mask[row, : len(real)] = 1
        else:
            mask[row, torch.randperm(columns - 1, generator=generator)[: len(real) - 1]] = 1
            mask[row, -1] = 1
        ids[row, mask[row] == 1] = real
    return ids, mask


@torch.no_grad()
def read(model, ids, mask, pieces=None, own_mask=False, **kwargs):
    """Logits [B, C, V] and cache after reading the columns in pieces; the mask covers the past too, or the piece."""
    cache, logits, start = BMojoCache(model.config), [], 0
    for size in pieces or [ids.shape[1]]:
        end = start + size
        given_mask = None if mask is None else mask[:, start if own_mask else 0 : end]
        out = model(input_ids=ids[:, start:end], attention_mask=given_mask, past_key_values=cache, **kwargs)
        assert out.past_key_values is cache
        logits.append(out.logits)
        start = end
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1), cache


def alone(model, row):
    """Logits [T, V] and cache of a row by itself in one forward."""
    return _alone(model, tuple(row.tolist()))


@functools.lru_cache(maxsize=256)
def _alone(model, row):
    logits, cache = read(model, torch.tensor([row]), None)
    return logits[0], cache


def memory(cache, row):
    """Everything the cache holds for a row, in an order that does not depend on how it was read: name -> tensor."""
    held = {}
    for index, layer in enumerate(cache.layers):
        spec, seen = layer.spec, int(layer.seen[row])
        held[f"{index}.seen"] = layer.seen[row]
        for name in ("outputs", "conv", "ssm", "clock"):
            if name in layer.states():
                held[f"{index}.{name}"] = getattr(layer, name)[row]
        if spec.has_attention and spec.window is None:
            held[f"{index}.keys"], held[f"{index}.values"] = layer.keys[row, :, :seen], layer.values[row, :, :seen]
            continue
        positions = layer.positions[row] if spec.has_attention else torch.empty(0)
        in_window, is_fading = positions >= seen - (spec.window or 0), torch.arange(len(positions)) < spec.fading
        sections = {"eidetic": ~is_fading & ~in_window, "fading": is_fading, "window": ~is_fading & in_window}
        for section, part in sections.items() if spec.has_attention else ():
            part = part & (positions >= 0)
            order = part.nonzero()[:, 0][positions[part].argsort()]
            names = (
                ("positions", "keys", "values")
                if section == "fading"
                else ("positions", "keys", "values", "innovations")
            )
            for name in names:
                state = getattr(layer, name)[row]
                held[f"{index}.{section}.{name}"] = (state.transpose(0, 1) if state.dim() == 3 else state)[order]
        if "delay_keys" in layer.states():
            made = seen // spec.stride
            slots = torch.arange(max(0, made - spec.delayed), made) % spec.delayed
            held[f"{index}.delay_keys"] = layer.delay_keys[row, slots]
            held[f"{index}.delay_values"] = layer.delay_values[row, slots]
    return held


def assert_near(actual, expected, what=""):
    assert actual.shape == expected.shape, what
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert expected.numel() == 0 or (actual - expected).abs().max() <= 1e-9 * scale, what


def assert_same_memory(cache, row, other, other_row=0):
    actual, expected = memory(cache, row), memory(other, other_row)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(actual[name], value, f"row {row}: {name}")


def assert_rows_alone(model, rows, logits, mask, cache):
    for index, row in enumerate(rows):
        expected, own = alone(model, row)
        assert_near(logits[index][mask[index] == 1], expected, f"row {index}")
        assert_same_memory(cache, index, own)


def test_the_rows_overflow_their_memories():
    """The premise: two rows let tokens go again, one is barely longer than the window, one is a single token."""
    model = build()
    for row, full in zip(sequences(ROWS["many"]), (True, True, False, False), strict=True):
        _, cache = alone(model, row)
        kept = cache.remembered(layer_idx=0)
        assert (len(kept) == SLOTS) is full
        assert not full or row.shape[0] > 4 * (WINDOW + SLOTS) - 10


# The matrix ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_prefill(name, pattern, count):
    model, rows = shared(name), sequences(ROWS[count])
    ids, mask = pad(rows, pattern)
    logits, cache = read(model, ids, mask)
    assert_rows_alone(model, rows, logits, mask, cache)
    with torch.no_grad():
        bare = model(input_ids=ids, attention_mask=mask, use_cache=False)
    for row in range(len(rows)):
        assert_near(bare.logits[row][mask[row] == 1], logits[row][mask[row] == 1])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_chunked_prefill(name, pattern, count):
    """Chunks longer and shorter than the window, and single columns; with left pads whole chunks are pads for a row."""
    model, rows = shared(name), sequences(ROWS[count])
    ids, mask = pad(rows, pattern)
    pieces = [7, 1, 4, 17, 1, 1, 13, 4]
    if pattern == "left":
        assert (mask[:, :7].sum(dim=1) == 0).any()
    for own_mask in (False, True):
        logits, cache = read(model, ids, mask, pieces, own_mask)
        assert_rows_alone(model, rows, logits, mask, cache)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_column_by_column(name, pattern):
    """Decoding steps in which some rows have a pad: those rows stay as they are."""
    model, rows = shared(name), sequences([20, 9, 13])
    ids, mask = pad(rows, pattern, columns=24)
    logits, cache = read(model, ids, mask, [1] * 24)
    assert_rows_alone(model, rows, logits, mask, cache)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_second_turn(name, pattern, count):
    """Two turns, each padded: the memory goes on as if the row had been read alone, in one go."""
    model = shared(name)
    first, second = sequences(ROWS[count]), sequences([9, 4, 25, 1][: len(ROWS[count])], seed=1)
    turns = [pad(first, pattern), pad(second, pattern, columns=26, seed=1)]
    ids, mask = (torch.cat(parts, dim=1) for parts in zip(*turns, strict=True))
    conversations = [torch.cat(parts) for parts in zip(first, second, strict=True)]
    for pieces in ([COLUMNS, 26], [COLUMNS, 3, 1, 22]):
        logits, cache = read(model, ids, mask, pieces)
        assert_rows_alone(model, conversations, logits, mask, cache)


@torch.no_grad()
def generate(model, ids, mask, cache=None, **kwargs):
    """New ids [B, new], their logits [B, new, V] and the cache."""
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1), out.past_key_values


@functools.lru_cache(maxsize=256)
def generated_alone(model, row):
    ids = torch.tensor([row])
    return generate(model, ids, torch.ones_like(ids))


def assert_generates_as_alone(model, rows, result):
    new, logits, cache = result
    for index, row in enumerate(rows):
        own_new, own_logits, own_cache = generated_alone(model, tuple(row.tolist()))
        assert_near(logits[index], own_logits[0], f"row {index}")
        assert new[index].tolist() == own_new[0].tolist()
        assert_same_memory(cache, index, own_cache)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_generate(name, pattern, count):
    model, rows = shared(name), sequences(ROWS[count])
    assert_generates_as_alone(model, rows, generate(model, *pad(rows, pattern)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_generate_with_chunked_prefill(pattern):
    model, rows = shared("mixed-layers"), sequences(ROWS["many"])
    assert_generates_as_alone(model, rows, generate(model, *pad(rows, pattern), prefill_chunk_size=7))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_generate_a_second_turn(pattern):
    """Prompt, answer, second prompt, answer: the whole conversation's ids and mask go in, the cache goes on."""
    model = shared("mixed-layers")
    first, second = sequences([30, 11, 2]), sequences([5, 16, 9], seed=1)
    ids, mask = pad(first, pattern)
    answer, _, cache = generate(model, ids, mask)
    more, more_mask = pad(second, pattern, columns=18, seed=1)
    ids = torch.cat([ids, answer, more], dim=1)
    mask = torch.cat([mask, torch.ones_like(answer), more_mask], dim=1)
    conversations = [torch.cat(parts) for parts in zip(first, answer, second, strict=True)]
    assert_generates_as_alone(model, conversations, generate(model, ids, mask, cache))


# Random masks --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=15)
@given(data=st.data())
def test_any_mask_in_any_pieces(name, data):
    columns = data.draw(st.integers(1, 40), label="columns")
    pattern = st.lists(st.booleans(), min_size=columns, max_size=columns)
    mask = torch.tensor(data.draw(st.lists(pattern, min_size=1, max_size=3), label="mask"), dtype=torch.long)
    pieces, left = [], columns
    while left:
        pieces.append(data.draw(st.integers(1, left), label="piece"))
        left -= pieces[-1]
    model = shared(name)
    ids = torch.randint(1, VOCAB, mask.shape)
    logits, cache = read(model, ids, mask, pieces, own_mask=data.draw(st.booleans(), label="own mask"))
    rows = [row[real == 1] for row, real in zip(ids, mask, strict=True)]
    for index, row in enumerate(rows):
        assert cache.seen[index] == len(row)
        if len(row):
            expected, own = alone(model, row)
            assert_near(logits[index][mask[index] == 1], expected)
            assert_same_memory(cache, index, own)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_type(dtype):
    model, rows = build(), sequences(ROWS["many"])
    ids, mask = pad(rows, "left")
    logits, cache = read(model, ids, mask.to(dtype), [30, 18])
    assert_rows_alone(model, rows, logits, mask, cache)


def test_a_row_of_pads_only_is_read_as_nothing():
    """No row to go on from, so generate() refuses it; but a batch of training or evaluation goes through."""
    model = build()
    ids, mask = pad(sequences([9, 4]), "left")
    mask[1] = 0
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[:1], attention_mask=mask[:1]).logits
    assert_near(logits[0], alone[0])
    assert not logits[1].any()
    with pytest.raises(ValueError, match=r"attention_mask\[1\] is all zeros"):
        model.generate(ids, attention_mask=mask)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("filler", [0, 1])
def test_given_positions_equal_counted_ones(pattern, filler):
    """Positions as generate() makes them: counted real tokens, pads at 0 or 1. No pad starts a sequence."""
    model, rows = build(), sequences(ROWS["many"])
    ids, mask = pad(rows, pattern)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, filler)
    with torch.no_grad():
        given_positions = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        counted = model(input_ids=ids, attention_mask=mask).logits
    assert_near(given_positions[mask == 1], counted[mask == 1])


def test_positions_shift_what_a_token_sees():
    """Given positions are used, not recounted."""
    model, (row,) = build(), sequences([20])
    with torch.no_grad():
        counted = model(input_ids=row[None]).logits
        spread = model(input_ids=row[None], position_ids=torch.arange(20)[None] * 3 + 2).logits
    assert (counted - spread).abs().max() > 1e-3


# Other outputs of padded batches -------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", PATTERNS)
def test_hidden_states(pattern):
    model, rows = build("mixed-layers"), sequences(ROWS["many"])
    ids, mask = pad(rows, pattern)
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for index, row in enumerate(rows):
            own = model(input_ids=row[None], output_hidden_states=True).hidden_states
            assert len(own) == len(padded) == 5
            for layer, expected in zip(padded, own, strict=True):
                assert_near(layer[index][mask[index] == 1], expected[0])


@pytest.mark.parametrize("name", ["output", "mixed-layers"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("columns", [4, COLUMNS])
def test_attention_weights(name, pattern, columns):
    """One column per input column: a row sums to 1, nothing falls on a pad, real columns equal the row alone."""
    model = build(name)
    model.set_attn_implementation("eager")
    rows = sequences([3, 1, 2] if columns == 4 else ROWS["many"])
    ids, mask = pad(rows, pattern, columns)
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
        for index, row in enumerate(rows):
            own = model(input_ids=row[None], output_attentions=True).attentions
            real = mask[index] == 1
            assert len(own) == len(padded)
            for weights, expected in zip(padded, own, strict=True):
                assert weights.shape == (len(rows), 4, columns, columns)
                assert_near(weights[index][:, real].sum(-1), torch.ones(4, len(row), dtype=torch.float64))
                assert (weights[index][:, real][:, :, ~real] == 0).all()
                assert_near(weights[index][:, real][:, :, real], expected[0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_weights_of_a_continued_cache(pattern):
    """With a cache the columns are the positions of the row's real tokens."""
    model = build()
    model.set_attn_implementation("eager")
    rows = sequences(ROWS["many"])
    ids, mask = pad(rows, pattern)
    start = 30
    with torch.no_grad():
        cache = BMojoCache(model.config)
        model(input_ids=ids[:, :start], attention_mask=mask[:, :start], past_key_values=cache)
        padded = model(input_ids=ids[:, start:], attention_mask=mask, past_key_values=cache, output_attentions=True)
        for index, row in enumerate(rows):
            real = mask[index, start:] == 1
            own = model(input_ids=row[None], output_attentions=True).attentions
            for weights, expected in zip(padded.attentions, own, strict=True):
                actual = weights[index][:, real]
                assert_near(actual.sum(-1), torch.ones(actual.shape[:2], dtype=torch.float64))
                wanted = expected[0][:, len(row) - int(real.sum()) :]
                assert_near(actual[:, :, : len(row)], wanted)


@pytest.mark.parametrize("pattern", ["left", "right"])
def test_classification_reads_the_last_real_token(pattern):
    model, rows = build(cls=BMojoForSequenceClassification, num_labels=3), sequences(ROWS["many"])
    ids, mask = pad(rows, pattern)
    with torch.no_grad():
        padded = model(input_ids=ids.masked_fill(mask == 0, PAD), attention_mask=mask).logits
        for index, row in enumerate(rows):
            assert_near(padded[index], model(input_ids=row[None]).logits[0])


def gradients(model, run):
    """Loss by `run`, and every parameter's gradient (zeros where nothing depends on it)."""
    model.zero_grad(set_to_none=False)
    loss = run()
    loss.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return loss.detach(), found


def assert_same_gradients(actual, expected):
    assert_near(actual[0], expected[0], "loss")
    for name, value in expected[1].items():
        assert_near(actual[1][name], value, name)


def weighted_sum(model, rows, seed=2):
    """Sum over rows, each read alone, of the logits under random weights: a loss that every logit takes part in."""
    weights = torch.randn(sum(map(len, rows)), VOCAB, generator=torch.Generator().manual_seed(seed)).double()
    parts = weights.split([len(row) for row in rows])
    return parts, lambda: sum((model(input_ids=r[None]).logits[0] * w).sum() for r, w in zip(rows, parts, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_of_a_padded_batch(name, pattern):
    model, rows = build(name).train(), sequences(ROWS["many"])
    ids, mask = pad(rows, pattern)
    parts, separate = weighted_sum(model, rows)

    def batched():
        logits = model(input_ids=ids, attention_mask=mask).logits
        return sum((logits[i][mask[i] == 1] * part).sum() for i, part in enumerate(parts))

    assert_same_gradients(gradients(model, batched), gradients(model, separate))


# Packed sequences ----------------------------------------------------------------------------------------------------
PACKS = {  # lengths of the sequences in each row of the input
    "one row": [[7, 13, 21, 3]],
    "single tokens": [[1, 1, 19, 1]],
    "two rows": [[17, 5, 1, 9], [1, 30, 1]],
    "a row that is one sequence": [[20], [8, 12]],
}


def pack(lengths):
    """Sequences, and ids [B, T] that hold them one after the other."""
    rows = sequences([length for row in lengths for length in row])
    return rows, torch.cat(rows).view(len(lengths), -1)


def boundaries(kind, lengths):
    """The arguments that say where sequences begin."""
    flat = [length for row in lengths for length in row]
    if kind == "position_ids":
        return dict(position_ids=torch.cat([torch.arange(n) for n in flat]).view(len(lengths), -1))
    if kind == "seq_idx":
        index = torch.cat([torch.full((n,), i) for row in lengths for i, n in enumerate(row)])
        return dict(seq_idx=index.view(len(lengths), -1).int())
    bounds = torch.tensor([0, *flat]).cumsum(0).int()
    return dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=max(flat), max_length_k=max(flat))


@functools.cache
def separate_ones(name, packing):
    """Logits of each sequence alone, then loss and gradients of their weighted sum."""
    model, (rows, _) = build(name).train(), pack(PACKS[packing])
    with torch.no_grad():
        logits = [model(input_ids=row[None]).logits[0] for row in rows]
    return logits, gradients(model, weighted_sum(model, rows)[1])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["position_ids", "seq_idx", "cu_seq_lens_q"])
@pytest.mark.parametrize("packing", PACKS)
def test_packed_sequences_equal_separate_ones(name, kind, packing):
    model = build(name).train()
    rows, ids = pack(PACKS[packing])
    parts, _ = weighted_sum(model, rows)
    arguments = boundaries(kind, PACKS[packing])
    expected, separate = separate_ones(name, packing)
    with torch.no_grad():
        logits = model(input_ids=ids, **arguments).logits.flatten(0, 1).split([len(row) for row in rows])
        for actual, wanted in zip(logits, expected, strict=True):
            assert_near(actual, wanted)
    weights = torch.cat(parts).view(*ids.shape, VOCAB)
    packed = gradients(model, lambda: (model(input_ids=ids, **arguments).logits * weights).sum())
    assert_same_gradients(packed, separate)


def test_all_boundaries_together():
    """What transformers' flattening collator can send at once."""
    model = build()
    rows, ids = pack(PACKS["one row"])
    arguments = {}
    for kind in ("position_ids", "seq_idx", "cu_seq_lens_q"):
        arguments |= boundaries(kind, PACKS["one row"])
    with torch.no_grad():
        logits = model(input_ids=ids, **arguments).logits[0].split([len(row) for row in rows])
        for actual, row in zip(logits, rows, strict=True):
            assert_near(actual, alone(model, row)[0])


def test_unmarked_sequences_see_each_other():
    """The premise of the tests above: without boundaries the second sequence differs."""
    model = build()
    rows, ids = pack([[7, 13]])
    with torch.no_grad():
        assert (model(input_ids=ids).logits[0, 7:] - alone(model, rows[1])[0]).abs().max() > 1e-3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_rows_with_pads(pattern):
    model = build()
    lengths = [[5, 1, 14], [8, 9]]
    rows = sequences([length for row in lengths for length in row])
    wholes = [torch.cat(rows[:3]), torch.cat(rows[3:])]
    ids, mask = pad(wholes, pattern, columns=25)
    positions = torch.zeros_like(ids)
    for row, sizes in enumerate(lengths):
        positions[row, mask[row] == 1] = torch.cat([torch.arange(n) for n in sizes])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    packed = torch.cat([logits[row][mask[row] == 1] for row in range(2)]).split([len(row) for row in rows])
    for actual, row in zip(packed, rows, strict=True):
        assert_near(actual, alone(model, row)[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_packing_under_gradient_checkpointing(use_reentrant):
    model = build().train()
    _, ids = pack(PACKS["two rows"])
    arguments = boundaries("position_ids", PACKS["two rows"])
    weights = torch.randn(*ids.shape, VOCAB).double()

    def run():
        return (model(input_ids=ids, **arguments).logits * weights).sum()

    expected = gradients(model, run)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same_gradients(gradients(model, run), expected)


def test_the_loss_of_packed_sequences():
    """Labels are -100 where a sequence begins, as flattening collators set them: the mean over all inner tokens."""
    model = build()
    rows, ids = pack(PACKS["one row"])
    labels = torch.cat([torch.cat([torch.tensor([-100]), row[1:]]) for row in rows])[None]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels, **boundaries("position_ids", PACKS["one row"])).loss
        parts = [torch.nn.functional.cross_entropy(alone(model, row)[0][:-1], row[1:], reduction="sum") for row in rows]
    mean = sum(parts) / sum(len(row) - 1 for row in rows)
    assert loss.item() == pytest.approx(mean.item(), rel=1e-6)  # transformers takes the loss in float32


@settings(max_examples=25)
@given(data=st.data())
def test_any_packing(data):
    lengths = data.draw(st.lists(st.integers(1, 24), min_size=2, max_size=6), label="lengths")
    kind = data.draw(st.sampled_from(["position_ids", "seq_idx", "cu_seq_lens_q"]), label="kind")
    model = build("state-decay")
    rows, ids = pack([lengths])
    with torch.no_grad():
        logits = model(input_ids=ids, **boundaries(kind, [lengths])).logits[0].split(lengths)
    for actual, row in zip(logits, rows, strict=True):
        assert_near(actual, alone(model, row)[0])


@pytest.mark.parametrize("kind", ["position_ids", "seq_idx", "cu_seq_lens_q"])
@pytest.mark.parametrize("read_before", [0, 6])
def test_packing_with_a_cache_is_refused(kind, read_before):
    """A cache holds one state per row. An empty one is refused too: it would come back with states of other rows."""
    model = build()
    _, ids = pack(PACKS["one row"])
    cache = BMojoCache(model.config)
    if read_before:
        model(input_ids=ids[:, :read_before], past_key_values=cache)
    with pytest.raises(ValueError, match=r"packed sequences|starts at 0 but the cache"):
        model(input_ids=ids, past_key_values=cache, **boundaries(kind, PACKS["one row"]))
    assert cache.get_seq_length() == read_before


def test_a_new_sequence_on_a_used_cache_is_refused():
    """A piece whose first real token has position 0 begins a sequence; the memory holds another one."""
    model = build()
    _, ids = pack(PACKS["one row"])
    cache = BMojoCache(model.config)
    model(input_ids=ids[:, :7], past_key_values=cache)
    with pytest.raises(ValueError, match="position"):
        model(input_ids=ids[:, 7:20], position_ids=torch.arange(13)[None], past_key_values=cache)


def test_packing_returns_no_cache():
    model = build()
    _, ids = pack(PACKS["one row"])
    with torch.no_grad():
        arguments = boundaries("position_ids", PACKS["one row"])
        assert model(input_ids=ids, use_cache=True, **arguments).past_key_values is None


def test_generating_from_a_packed_prompt_is_refused():
    model = build()
    _, ids = pack(PACKS["one row"])
    with pytest.raises(ValueError, match="packed sequences"):
        model.generate(ids, max_new_tokens=2, **boundaries("position_ids", PACKS["one row"]))


def test_packing_with_attention_weights_is_refused():
    model = build()
    model.set_attn_implementation("eager")
    _, ids = pack(PACKS["one row"])
    with pytest.raises(ValueError, match=r"packed sequences.*output_attentions"):
        model(input_ids=ids, output_attentions=True, **boundaries("position_ids", PACKS["one row"]))


@pytest.mark.parametrize("bounds", [[1, 7, 20], [0, 7, 19], [0, 7, 21], [0, 12, 7, 20], [0, 7, 7, 20]])
def test_lengths_that_do_not_add_up_are_refused(bounds):
    (row,) = sequences([20])
    with pytest.raises(ValueError, match=r"cu_seq_lens_q=\[.*must rise from 0 to the number of tokens, 20"):
        build()(input_ids=row[None], cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32))
