"""The chunked scan against the recurrence: gradients, edges of chunks and blocks, memory, layouts, torch.compile."""

import importlib.util
import sys

import pytest
import torch
import torch.utils.checkpoint

from modeling_bmojo import scan_blocks, scan_ops
from modeling_bmojo.ssm_ops import chunk_ssd, naive_ssd, predict_input
from tests.modeling.test_ssm_ops import EXACT, draw


NAMES = ["x", "dt", "A", "B", "C", "D", "initial_state"]


def outputs_and_gradients(form, inputs, chunk_size=4, wanted=NAMES, through=("y", "final")):
    """y, the final state and, by name, the gradients of a weighted sum of what `through` lists."""
    leaves = {name: value if value is None else value.detach().clone() for name, value in zip(NAMES, inputs)}
    wanted = [name for name in wanted if leaves[name] is not None]
    for name in wanted:
        leaves[name].requires_grad_()
    results = dict(zip(("y", "final"), form(**leaves, chunk_size=chunk_size)))
    generator = torch.Generator().manual_seed(5)
    total = sum(0 * leaves[name].sum() for name in wanted)  # the final state depends on neither C nor D
    for value in (results[name] for name in through):
        weight = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        total = total + (value * weight).sum()
    gradients = torch.autograd.grad(total, [leaves[name] for name in wanted])
    return {name: value.detach() for name, value in results.items()} | dict(zip(wanted, gradients))


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def chunks_per_block(monkeypatch):
    """Fixes how many chunks a block has."""

    def fix(count):
        monkeypatch.setattr(scan_blocks, "_chunks_per_block", lambda *_: count)

    return fix


@pytest.mark.parametrize("per_block", [1, 2, 3])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("offset", [-5, -4, -1, 0, 1, 4, 5])
def test_edges_of_blocks(chunks_per_block, per_block, blocks, offset):
    tokens = 4 * per_block * blocks + offset
    if tokens < 1:
        tokens = 4 * per_block * blocks + 2
    chunks_per_block(per_block)
    inputs = draw(tokens=tokens, seed=tokens)
    assert_equal(outputs_and_gradients(chunk_ssd, inputs), outputs_and_gradients(naive_ssd, inputs))


def test_blocks_cover_every_chunk_once(chunks_per_block):
    chunks_per_block(3)
    x, dt, A, B, C, _, _ = draw(tokens=4 * 7 + 2)
    whole, rest = scan_blocks.runs(x.shape[1], 4, B.shape[2])
    spans = [block.chunks for block in whole.blocks(x, dt, A, B, C)]
    assert [(span.start, span.stop) for span in spans] == [(0, 3), (3, 6), (6, 7)]
    assert [block.chunks for block in whole.blocks(x, dt, A, B, C, backward=True)] == spans[::-1]
    assert (rest.chunk, rest.count, rest.length, rest.tokens) == (7, 1, 2, slice(28, 30))


@pytest.mark.parametrize("wanted", NAMES)
@pytest.mark.parametrize("through", [("y",), ("final",), ("y", "final")])
def test_each_gradient_alone(wanted, through):
    inputs = draw(tokens=10)
    actual = outputs_and_gradients(chunk_ssd, inputs, wanted=[wanted], through=through)
    assert_equal(actual, outputs_and_gradients(naive_ssd, inputs, wanted=[wanted], through=through))


@pytest.mark.parametrize("heads, groups", [(1, 1), (4, 1), (4, 4), (6, 2)])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("channels, width", [(3, 5), (1, 1), (4, 2)])
def test_gradients_of_every_shape(heads, groups, skip, started, channels, width):
    inputs = draw(tokens=10, heads=heads, groups=groups, channels=channels, width=width)
    inputs[5], inputs[6] = inputs[5] if skip else None, inputs[6] if started else None
    assert_equal(outputs_and_gradients(chunk_ssd, inputs), outputs_and_gradients(naive_ssd, inputs))


def test_gradcheck():
    leaves = [value.requires_grad_() for value in draw(tokens=7, batch=1, heads=2, groups=1, channels=2, width=2)]
    assert torch.autograd.gradcheck(lambda *values: chunk_ssd(*values, chunk_size=3), leaves)
    x, dt, A, B, _, _, state = leaves
    assert torch.autograd.gradcheck(lambda *values: predict_input(*values, chunk_size=3), (x, dt, A, B, state))


@pytest.mark.parametrize("tokens", [1, 4, 10])
def test_gradients_of_the_prediction(tokens):
    def by_recurrence(x, dt, A, B, initial_state, chunk_size, **unused):
        read, final = naive_ssd(x, dt, A, B, B, None, initial_state)
        own = (B * B).sum(-1).repeat_interleave(x.shape[2] // B.shape[2], dim=2) * dt
        return read - own[..., None] * x, final

    def chunked(x, dt, A, B, initial_state, chunk_size, **unused):
        return predict_input(x, dt, A, B, initial_state, chunk_size), initial_state

    inputs, wanted = draw(tokens=tokens), ["x", "dt", "A", "B", "initial_state"]
    actual = outputs_and_gradients(chunked, inputs, wanted=wanted, through=("y",))
    expected = outputs_and_gradients(by_recurrence, inputs, wanted=wanted, through=("y",))
    assert_equal(actual | {"final": expected["final"]}, expected)


def test_the_first_token_is_not_expected_from_nothing():
    x, dt, A, B, _, _, _ = draw(tokens=9, dtype=torch.float32)
    assert not predict_input(x, dt, A, B, None, 4)[:, 0].any()
    assert predict_input(x[:, :0], dt[:, :0], A, B[:, :0], None, 4).shape == x[:, :0].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_very_fast_decay_and_no_decay(dtype):
    """dt A = -10,000 forgets everything at once, dt = 0 nothing; both in one chunk, and never 0 times infinity."""
    x, dt, A, B, C, D, state = draw(tokens=13, dtype=dtype)
    dt, A = torch.ones_like(dt), torch.full_like(A, -1e4)
    dt[:, [0, 2, 3, 8, 12]] = 0
    inputs = [x, dt, A, B, C, D, state]
    actual = outputs_and_gradients(chunk_ssd, inputs, chunk_size=6)
    assert all(torch.isfinite(value).all() for value in actual.values())
    expected = outputs_and_gradients(naive_ssd, [value.double() for value in inputs])
    tolerance = EXACT if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value, **tolerance)


@pytest.mark.parametrize("speed", [0.1, 1.0, 10.0])
def test_fp32_stays_at_the_noise_floor(speed):
    """Outputs and gradients as near to float64 as the fp32 recurrence's own; measured 0.5 to 2.4 times its distance."""
    for seed in range(3):
        exact = draw(tokens=200, channels=16, width=16, seed=seed)
        exact[1] *= speed
        single = [value.float() for value in exact]
        truth = outputs_and_gradients(naive_ssd, exact)
        floor = outputs_and_gradients(naive_ssd, single)
        for name, value in outputs_and_gradients(chunk_ssd, single, chunk_size=64).items():
            noise = (floor[name] - truth[name]).square().mean().sqrt()
            assert noise > 0
            assert (value - truth[name]).square().mean().sqrt() < 4 * noise, name


def test_saves_inputs_and_one_state_per_chunk():
    """No [L, L] piece outlives the forward pass, whatever the length."""
    for tokens in (16, 64):
        leaves = [value.requires_grad_() for value in draw(tokens=tokens)]
        given = {value.untyped_storage().data_ptr() for value in leaves}
        saved = {}

        def pack(value, given=given, saved=saved):
            storage = value.untyped_storage()
            if storage.data_ptr() not in given:
                saved[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            kept = chunk_ssd(*leaves, chunk_size=8)
        assert sum(saved.values()) == (tokens // 8 + 1) * leaves[-1].nbytes
        assert kept[0].requires_grad and kept[1].requires_grad


@pytest.mark.parametrize("through", [("y",), ("final",), ("y", "final")])
def test_gradient_checkpointing(through):
    def checkpointed(**arguments):
        return torch.utils.checkpoint.checkpoint(chunk_ssd, **arguments, use_reentrant=False)

    inputs = draw(tokens=10)
    expected = outputs_and_gradients(chunk_ssd, inputs, through=through)
    assert_equal(outputs_and_gradients(checkpointed, inputs, through=through), expected)


@pytest.mark.parametrize("training", [True, False])
def test_temporaries_do_not_grow_with_the_tokens(monkeypatch, training):
    made = []

    class Counted(scan_blocks.Scratch):
        def __init__(self, like):
            super().__init__(like)
            made.append(self)

    monkeypatch.setattr(scan_ops, "Scratch", Counted)
    monkeypatch.setitem(scan_blocks.WORKING_SET, "cpu", 1 << 15)
    totals = []
    for tokens in (64, 256):
        made.clear()
        inputs = [value.requires_grad_(training) for value in draw(tokens=tokens, batch=1)]
        y, _ = chunk_ssd(*inputs, chunk_size=8)
        if training:
            y.sum().backward()
        assert len(made) == 1 + training
        totals.append([sum(buffer.nbytes for buffer in scratch.buffers.values()) for scratch in made])
    assert totals[0] == totals[1] and min(totals[0]) > 0
    assert max(totals[0]) < 2 << 15


def test_no_tensor_is_read_before_it_is_written(monkeypatch):
    """In deterministic mode torch fills new memory with NaN."""
    expected = outputs_and_gradients(naive_ssd, draw(tokens=14))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert_equal(outputs_and_gradients(chunk_ssd, draw(tokens=14)), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("training", [True, False])
def test_inputs_are_left_as_they_are(training):
    inputs = [value.requires_grad_(training) for value in draw(tokens=10)]
    before = [value.detach().clone() for value in inputs]
    y, final = chunk_ssd(*inputs, chunk_size=4)
    if training:
        (y.sum() + final.sum()).backward()
    prediction = predict_input(*inputs[:4], inputs[6], chunk_size=4)
    assert prediction.requires_grad == training
    assert [value._version for value in inputs] == [0] * len(inputs)
    assert all(torch.equal(value, copy) for value, copy in zip(inputs, before))
    storages = {value.untyped_storage().data_ptr() for value in inputs}
    assert not storages & {value.untyped_storage().data_ptr() for value in (y, final, prediction)}


def test_slices_of_one_projection():
    """What the mixer hands over: x, B and C are columns of one tensor, dt of another; here the state is a view too."""
    heads, groups, channels, width = 4, 2, 3, 5
    sizes = [heads * channels, groups * width, groups * width]
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(2, 11, sum(sizes) + 7, generator=generator, dtype=torch.float64)
    times = torch.rand(2, 11, heads + 3, generator=generator, dtype=torch.float64)
    state = torch.randn(2, heads, width, channels, generator=generator, dtype=torch.float64)
    A, D = draw(tokens=1)[2], draw(tokens=1)[5]
    x, B, C = projection[..., 7:].split(sizes, dim=-1)
    x, B, C = x.unflatten(-1, (heads, channels)), B.unflatten(-1, (groups, width)), C.unflatten(-1, (groups, width))
    views = [x, times[..., 3:], A, B, C, D, state.mT]
    assert not any(value.is_contiguous() for value in (x, views[1], B, C, views[-1]))
    expected = outputs_and_gradients(naive_ssd, [value.contiguous() for value in views])
    y, final = chunk_ssd(*views, chunk_size=4)
    torch.testing.assert_close(y, expected["y"], **EXACT)
    torch.testing.assert_close(final, expected["final"], **EXACT)

    leaves = [value.requires_grad_() for value in (projection, times, state)]
    x, B, C = leaves[0][..., 7:].split(sizes, dim=-1)
    x, B, C = x.unflatten(-1, (heads, channels)), B.unflatten(-1, (groups, width)), C.unflatten(-1, (groups, width))
    y, final = chunk_ssd(x, leaves[1][..., 3:], A, B, C, D, leaves[2].mT, 4)
    by_naive = naive_ssd(x, leaves[1][..., 3:], A, B, C, D, leaves[2].mT)
    # The gradient of a sum is expanded from one number: the least contiguous there is.
    actual = torch.autograd.grad(y.sum() + final.mT.sum(), leaves)
    for value, wanted in zip(actual, torch.autograd.grad(by_naive[0].sum() + by_naive[1].sum(), leaves)):
        torch.testing.assert_close(value, wanted, **EXACT)


def test_backward_under_autocast_is_not_lowered():
    inputs = draw(tokens=10, dtype=torch.float32)
    expected = outputs_and_gradients(chunk_ssd, inputs)
    leaves = [value.clone().requires_grad_() for value in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = chunk_ssd(*leaves, chunk_size=4)
        assert y.dtype == final.dtype == torch.float32
        assert torch.equal(y, expected["y"]) and torch.equal(final, expected["final"])
        actual = torch.autograd.grad(y.square().sum(), leaves)
    y, _ = chunk_ssd(*leaves, chunk_size=4)
    for value, wanted in zip(actual, torch.autograd.grad(y.square().sum(), leaves)):
        assert torch.equal(value, wanted)


def test_a_second_derivative_is_refused():
    leaves = [value.requires_grad_() for value in draw(tokens=5)]
    y, _ = chunk_ssd(*leaves, chunk_size=4)
    (gradient,) = torch.autograd.grad(y.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="scan_backward"):
        gradient.sum().backward()


# torch.compile -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_operators_keep_their_contract(keep, skip):
    inputs = [value.requires_grad_(keep) for value in draw(tokens=10)]
    inputs[5:] = inputs[5:] if skip else (None, None)
    torch.library.opcheck(scan_ops._scan, (*inputs, 4, True, keep))


def test_compiles_whole_and_once_for_all_lengths():
    """No graph break, and with dynamic shapes one graph for every number of tokens, also in training."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(chunk_ssd, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (9, 14, 23):
        inputs = draw(tokens=tokens)
        assert_equal(outputs_and_gradients(compiled, inputs), outputs_and_gradients(chunk_ssd, inputs))
    assert counter.frame_count == 1
    with torch.no_grad():
        for tokens in (9, 14, 23):
            inputs = draw(tokens=tokens)
            for value, wanted in zip(compiled(*inputs, chunk_size=4), chunk_ssd(*inputs, chunk_size=4)):
                assert torch.equal(value, wanted)
    assert counter.frame_count == 2
    predict = torch.compile(predict_input, fullgraph=True, backend="aot_eager")
    x, dt, A, B, _, _, state = draw(tokens=9)
    assert torch.equal(predict(x, dt, A, B, state, 4), predict_input(x, dt, A, B, state, 4))
    torch._dynamo.reset()


def test_copies_of_the_file_do_not_disturb_each_other():
    """Remote code is a second copy of the package, and may be loaded under a name that was in use before."""

    def load():
        spec = importlib.util.spec_from_file_location("modeling_bmojo._copy", scan_ops.__file__)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    try:
        copies = [scan_ops, load(), load()]
    finally:
        sys.modules.pop("modeling_bmojo._copy", None)
    assert len({module._NAMESPACE for module in copies}) == 3
    inputs = draw(tokens=9)
    expected = outputs_and_gradients(naive_ssd, inputs)
    for module in copies:
        assert_equal(outputs_and_gradients(module.scan_chunks, inputs), expected)
