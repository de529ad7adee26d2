"""The Triton kernels against float64 oracles and against the torch forms whose place they take.

Without a GPU Triton interprets the kernels on CPU tensors (`conftest.py` sets TRITON_INTERPRET=1); with one the same
tests run on it, compiled, and one more test interprets them in a process of its own. Interpreted programs are slow, so
shapes are as small as the tile edges allow. That the kernels also compile for an H200 is checked without one.
"""

import importlib
import inspect
import json
import math
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from modeling_bmojo import kernels_attention, kernels_common, kernels_memory, kernels_ssm, memory_ops, ssm_ops
from modeling_bmojo.attention_ops import KeySet, banded, block_attention, gathered
from modeling_bmojo.kernels_attention import gathered_attention, offers_to_index, triton_block_attention
from tests.oracles import oracle_gathered_attention, oracle_ssd


ROOT = Path(__file__).resolve().parents[3]
DEVICE = "cuda" if torch.cuda.is_available() and not kernels_common.INTERPRETED else "cpu"
EXACT = dict(rtol=1e-10, atol=1e-10)
HAS_WHEELS = sys.platform == "linux" and platform.machine() == "x86_64"


@pytest.fixture(autouse=True)
def triton_is_usable():
    """A missing Triton fails where there are wheels of it; elsewhere there is nothing to test but its absence."""
    reason = kernels_common.unavailable(DEVICE)
    if reason is not None and not HAS_WHEELS:
        pytest.skip(reason)
    assert reason is None, reason


@pytest.fixture
def deterministic():
    """torch's deterministic mode, in which torch.empty is full of NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_programs(monkeypatch):
    """Larger float64 tiles than a GPU's registers would hold: the interpreter's cost is by the program."""
    for table in kernels_attention.TILES.values():
        monkeypatch.setitem(table, torch.float64, (32, 32, 4, 1))


def normal(*shape, seed=0, dtype=torch.float64, grad=False):
    value = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return value.to(DEVICE, dtype).requires_grad_(grad)


def gradients(function, leaves, seed=9):
    """Outputs of `function(*leaves)`, and gradients of their products with random directions."""
    leaves = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((out * normal(*out.shape, seed=seed + i)).sum() for i, out in enumerate(outputs))
    wanted = [leaf for leaf in leaves if leaf is not None]
    return list(outputs), list(torch.autograd.grad(total, wanted, materialize_grads=True))


def assert_same(actual, expected, **tolerance):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, **(tolerance or EXACT))


def root_mean_square(value):
    return value.detach().double().square().mean().sqrt().item()


# Availability --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kernel, form",
    [
        (kernels_memory.select, memory_ops.select),
        (kernels_memory.output_innovation, memory_ops.output_innovation),
        (kernels_ssm.causal_conv, ssm_ops.causal_conv),
        (kernels_ssm.step_ssd, ssm_ops.step_ssd),
    ],
)
def test_a_kernel_has_the_signature_of_its_torch_form(kernel, form):
    assert inspect.signature(kernel) == inspect.signature(form)


def test_without_triton_the_modules_import_and_say_why(monkeypatch):
    """A second copy of the package's files, imported while `import triton` fails."""
    package = types.ModuleType("bmojo_without_triton")
    package.__path__ = [str(ROOT / "modeling_bmojo")]
    monkeypatch.setitem(sys.modules, "bmojo_without_triton", package)
    monkeypatch.setitem(sys.modules, "triton", None)
    before = set(sys.modules)
    names = ("attention", "memory", "ssm", "common")
    attention, memory, ssm, common = (importlib.import_module(f"bmojo_without_triton.kernels_{n}") for n in names)
    for module in (attention, memory, ssm):
        assert "pip install" in module.TRITON_MISSING
    assert common.unavailable("cuda") == common.unavailable("cpu") == common.TRITON_MISSING
    x = torch.zeros(1, 2, 3)
    with pytest.raises(RuntimeError, match=r"pip install .* use the torch form"):
        ssm.causal_conv(x, torch.zeros(3, 2), None)
    for name in set(sys.modules) - before:
        sys.modules.pop(name)


def test_devices_without_kernels_are_named(monkeypatch):
    assert "not for meta" in kernels_common.unavailable("meta")
    monkeypatch.setattr(kernels_common, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in kernels_common.unavailable("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert "compute capability 8.0" in kernels_common.unavailable("cuda")


def test_every_kernel_compiles_for_hopper(tmp_path):
    """Without a GPU: Triton brings its own assembler. 16-bit attention must reach Hopper's tensor core instructions."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = {report["kernel"]: report for report in map(json.loads, done.stdout.splitlines())}
    kernels = {
        name
        for module in (kernels_attention, kernels_memory, kernels_ssm)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert set(reports) == kernels and len(kernels) == 8
    for report in reports.values():
        assert report["cubin"] > 0
        assert report["shared"] <= 227 * 1024
        assert report["tensor_cores"] == (report["kernel"] in vars(kernels_attention))


if DEVICE == "cuda":

    def test_the_kernels_interpreted_on_the_cpu():
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "pytest", "-q", __file__]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=900)
        assert done.returncode == 0, done.stdout[-4000:]


# Attention -----------------------------------------------------------------------------------------------------------
def problem(heads, groups, tokens, block, offered, dim, stored=30, batch=1, dtype=torch.float64, seed=1):
    """Random spans, a good part of them empty or beyond the queries; random columns, some of them none or repeated."""
    generator = torch.Generator().manual_seed(seed)
    query = normal(batch, tokens, heads, dim, seed=seed, dtype=dtype)
    keys, values = (normal(batch, stored, groups, dim, seed=seed + i, dtype=dtype) for i in (1, 2))
    begin = torch.randint(-tokens, tokens, (batch, stored), generator=generator)
    end = begin + torch.randint(0, 2 * tokens + 2, (batch, stored), generator=generator)
    end[:, ::7] = memory_ops.NEVER
    index = torch.randint(-3, stored, (batch, -(-tokens // block), offered), generator=generator).clamp(min=-1)
    return (query, keys, values), (begin.to(DEVICE), end.to(DEVICE), index.to(DEVICE), block, dim**-0.5)


def compare_with_oracle(leaves, rest):
    actual = gradients(lambda *qkv: gathered_attention(*qkv, *rest), leaves)
    expected = gradients(lambda *qkv: oracle_gathered_attention(*qkv, *rest), leaves)
    assert_same(*(outputs + grads for outputs, grads in (actual, expected)))
    return actual


SWEEP = [  # heads, groups, T, L, K, D
    (1, 1, 1, 1, 1, 8),  # one of everything
    (3, 1, 7, 8, 5, 16),  # T < L, one group for all heads
    (2, 2, 8, 8, 32, 16),  # T = L, a group per head, K = the tile
    (9, 3, 9, 8, 33, 64),  # T = L + 1, three heads to a group, one column behind the tile
    (6, 2, 15, 8, 31, 80),  # T = 2 L - 1, D between two powers of two
    (4, 1, 13, 5, 40, 24),  # L odd
    (4, 1, 17, 17, 20, 16),  # more rows in a block than in a tile
]


@pytest.mark.parametrize("sizes", SWEEP, ids=str)
def test_attention_is_one_softmax_over_what_is_visible(sizes, few_programs):
    compare_with_oracle(*problem(*sizes))


@pytest.mark.parametrize("sizes", [SWEEP[1], SWEEP[4], SWEEP[6]], ids=str)
def test_deterministic_attention(sizes, few_programs, deterministic):
    """Shares of dk and dv are stored apart and added in order; nothing of the NaN in fresh tensors is read."""
    leaves, rest = problem(*sizes, batch=2)
    once = compare_with_oracle(leaves, rest)
    again = gradients(lambda *qkv: gathered_attention(*qkv, *rest), leaves)
    for one, other in zip(once[0] + once[1], again[0] + again[1], strict=True):
        assert torch.equal(one, other)


def test_smallest_tiles():
    """float64's own tiles, 16 by 16: several of them both ways."""
    compare_with_oracle(*problem(3, 1, 8, 8, 20, 16))


@pytest.mark.parametrize("begin, end", [(15, 17), (16, 33), (31, 32), (0, 16)])
def test_spans_at_the_edges_of_a_tile(begin, end):
    """A tile of keys meets only the rows that its spans can reach; here the spans end beside tile edges."""
    leaves, rest = problem(1, 1, 40, 40, 10, 16)
    spans = [torch.full_like(rest[0], edge) for edge in (begin, end)]
    compare_with_oracle(leaves, (*spans, *rest[2:]))


@pytest.mark.parametrize("case", ["no column", "no key", "empty span", "later span"])
def test_queries_that_see_nothing(case, deterministic):
    (query, keys, values), (begin, end, index, block, scaling) = problem(2, 1, 5, 4, 6, 16, batch=2)
    if case == "no column":
        index = index[:, :, :0]
    elif case == "no key":
        index = torch.full_like(index, -1)
    else:
        begin, end = (begin, begin) if case == "empty span" else (begin + 100, end + 200)
    rest = (begin, end, index, block, scaling)
    outputs, grads = gradients(lambda *qkv: gathered_attention(*qkv, *rest), (query, keys, values))
    assert outputs[0].shape == query.shape
    for value in outputs + grads:
        assert torch.equal(value, torch.zeros_like(value))


def test_no_queries():
    query, keys = normal(2, 0, 2, 16, grad=True), normal(2, 5, 1, 16, grad=True)
    span = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    index = torch.zeros(2, 0, 3, dtype=torch.int64, device=DEVICE)
    out = gathered_attention(query, keys, keys, span, span, index, 4, 0.25)
    out.sum().backward()
    assert out.shape == query.shape and not keys.grad.any()


def test_keys_that_are_not_offered_are_not_read(few_programs):
    (query, keys, values), (begin, end, index, block, scaling) = problem(2, 1, 6, 4, 9, 16)
    index = torch.where(index == 3, -1, index)
    expected = gathered_attention(query, keys, values, begin, end, index, block, scaling)
    keys[:, 3], values[:, 3] = math.nan, math.inf
    assert torch.equal(gathered_attention(query, keys, values, begin, end, index, block, scaling), expected)


def test_views_and_broadcast_arguments(few_programs):
    """Channels last in memory for nobody, spans and index shared by the rows: strides are followed."""
    (query, keys, values), (begin, end, index, block, scaling) = problem(4, 2, 9, 4, 12, 16, batch=2)
    plain = (begin[:1].repeat(2, 1), end[:1].repeat(2, 1), index[:1].repeat(2, 1, 1), block, scaling)
    shared = (begin[:1].expand(2, -1), end[:1].expand(2, -1), index[:1].int().expand(2, -1, -1), block, scaling)
    views = (
        query.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([keys, values], dim=-1)[..., :16],
        values.transpose(2, 3).contiguous().transpose(2, 3),
    )
    assert not any(view.is_contiguous() for view in views)
    expected = gathered_attention(query, keys, values, *plain)
    assert torch.equal(gathered_attention(*views, *shared), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_as_near_float64_as_torch_is(dtype):
    """Distances from float64 in units of the torch form's own, in the same dtype on the same inputs."""
    leaves, rest = problem(4, 2, 24, 16, 70, 64, stored=90, dtype=dtype)
    begin, end, index, block, scaling = rest
    begin[:, :20], end[:, :20] = 0, 24  # every query sees something: torch's softmax over nothing is NaN
    index[:, :, :20] = torch.arange(20, device=DEVICE)

    def torch_form(query, keys, values):
        offer = gathered(KeySet(keys, values, begin, end, begin), index)
        return block_attention(query, [offer], block, scaling)[0]

    exact = gradients(lambda *qkv: oracle_gathered_attention(*qkv, *rest), [leaf.double() for leaf in leaves])
    ours = gradients(lambda *qkv: gathered_attention(*qkv, *rest), leaves)
    theirs = gradients(torch_form, leaves)
    for truth, actual, floor in zip(*(outputs + grads for outputs, grads in (exact, ours, theirs)), strict=True):
        assert actual.dtype == dtype
        noise = root_mean_square(floor - truth)
        assert noise > 0
        assert root_mean_square(actual - truth) < 1.5 * noise


def test_tf32_follows_torch():
    """In a process of its own: torch refuses to read the older of its two flags once the newer one was set."""
    code = """if True:
        import sys, types, torch
        package = types.ModuleType("bmojo")
        package.__path__ = [sys.argv[1]]
        sys.modules["bmojo"] = package
        from bmojo.kernels_attention import tf32_allowed
        flags = torch.backends.cuda.matmul
        print(tf32_allowed())
        flags.allow_tf32 = True
        print(tf32_allowed())
        flags.allow_tf32 = False
        print(tf32_allowed())
        if hasattr(flags, "fp32_precision"):
            flags.fp32_precision = "tf32"
            print(tf32_allowed())
    """
    command = [sys.executable, "-c", code, str(ROOT / "modeling_bmojo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = done.stdout.split()
    assert answers[:3] == ["False", "True", "False"] and answers[3:] in ([], ["True"])


@pytest.mark.parametrize("continued", [False, True])
def test_three_memories_as_the_layer_offers_them(continued, few_programs):
    """[local | eidetic | fading] with real expiries, from key sets to gradients, against `block_attention`."""
    window, slots, fading, block, tokens, batch = 5, 3, 2, 4, 14, 2
    held, past = (slots, window) if continued else (0, 0)
    stored = held + past + tokens
    valid = torch.ones(batch, stored, dtype=torch.bool, device=DEVICE)
    valid[0, held - 1 : held] = valid[1, -2:] = False  # an empty slot, and pads at a row's end
    chosen = memory_ops.select(normal(batch, stored).abs(), valid, window, slots, block, tokens, held, past)
    coordinate = torch.arange(-held - past, tokens, device=DEVICE).expand(batch, -1)
    end = torch.where(valid | (coordinate < 0), chosen.expiry, coordinate + 1)
    query, keys, values = (
        normal(batch, tokens, 4, 16),
        normal(batch, stored, 2, 16),
        normal(batch, stored, 2, 16, seed=1),
    )
    faded = [normal(batch, past + tokens, 2, 16, seed=seed) for seed in (2, 3)]
    since = torch.arange(-past, tokens, device=DEVICE).expand(batch, -1)

    def key_sets(keys, values, fading_keys, fading_values):
        line = KeySet(keys, values, coordinate, end, coordinate, -held - past)
        beyond = KeySet(fading_keys, fading_values, since + window, since + window + fading, since, -past)
        return line, beyond

    def kernels(query, *leaves):
        line, beyond = key_sets(*leaves)
        sets = [(line, (1 - window, 0)), (line, chosen.slots), (beyond, (1 - window - fading, -window))]
        return triton_block_attention(query, sets, block, 0.25)

    def torch_form(query, *leaves):
        line, beyond = key_sets(*leaves)
        local = KeySet(*(value[:, held:] for value in line[:5]), -past)
        blocks = -(-tokens // block)
        offers = [banded(local, 1 - window, 0, blocks, block), gathered(line, chosen.slots)]
        offers.append(banded(beyond, 1 - window - fading, -window, blocks, block))
        return block_attention(query, offers, block, 0.25)[0]

    results = (gradients(form, [query, keys, values, *faded]) for form in (kernels, torch_form))
    assert_same(*(outputs + grads for outputs, grads in results))


def test_a_set_that_is_offered_twice_is_joined_once():
    span = torch.zeros(2, 5, dtype=torch.int64)
    first = KeySet(torch.zeros(2, 5, 1, 4), torch.zeros(2, 5, 1, 4), span, span, span, -2)
    other = first._replace(
        keys=torch.ones(2, 3, 1, 4), values=torch.ones(2, 3, 1, 4), begin=span[:, :3], end=span[:, :3]
    )
    picked, last = torch.tensor([[[4, -1]], [[0, 2]]]), torch.tensor([[[1]], [[-1]]])
    keys, values, begin, end, index = offers_to_index([(first, (-1, 0)), (first, picked), (other, last)], 1, 3)
    assert keys.shape[1] == values.shape[1] == begin.shape[1] == end.shape[1] == 8
    assert index.tolist() == [[[1, 2, 3, 4, 4, -1, 6]], [[1, 2, 3, 4, 0, 2, -1]]]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(keys=torch.zeros(1, 3, 1, 16)), "must be one dtype"),
        (dict(index=torch.zeros(1, 2, 3, dtype=torch.int64)), "index has 2 blocks for 4 queries .* must be 1"),
        (dict(query=normal(1, 4, 3, 16), keys=normal(1, 3, 2, 16), values=normal(1, 3, 2, 16)), "must divide"),
        (dict(query=normal(1, 4, 1, 257)), "at most 256"),
    ],
)
def test_attention_refuses_what_does_not_fit(change, message):
    keys, span = normal(1, 3, 1, 16), torch.zeros(1, 3, dtype=torch.int64)
    arguments = dict(query=normal(1, 4, 2, 16), keys=keys, values=keys, begin=span, end=span, block=4, scaling=1.0)
    arguments |= dict(index=torch.zeros(1, 1, 3, dtype=torch.int64)) | change
    with pytest.raises(ValueError, match=message):
        gathered_attention(**arguments)


# Eidetic memory ------------------------------------------------------------------------------------------------------
def assert_same_selection(keys, valid, *sizes):
    keys, valid = keys.to(DEVICE), valid.to(DEVICE)
    assert_same(kernels_memory.select(keys, valid, *sizes), memory_ops.select(keys, valid, *sizes), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 1000])
@pytest.mark.parametrize("window, slots, block", [(1, 1, 1), (3, 4, 16), (9, 5, 7), (2, 40, 8), (4, 0, 5)])
def test_selection_of_a_whole_stream(dtype, levels, window, slots, block, deterministic):
    """Few levels: most comparisons are ties. Infinite keys too, which `retention_key` makes of log 0."""
    generator = torch.Generator().manual_seed(levels + slots)
    keys = torch.randint(0, levels, (2, 33), generator=generator).to(dtype)
    keys[0, ::5], keys[1, ::9] = -math.inf, math.inf
    valid = torch.rand(2, 33, generator=generator) < 0.9
    assert_same_selection(keys, valid, window, slots, block, 33 + 2 * (window == 3))


@pytest.mark.parametrize("order", ["rising", "falling", "level"])
def test_streaming_is_the_heap(order):
    """Rising keys: every token enters. Falling or level: none does once the memory is full."""
    keys = {"rising": torch.arange(40.0), "falling": -torch.arange(40.0), "level": torch.zeros(40)}[order]
    ones = torch.ones(1, 40, dtype=torch.bool, device=DEVICE)
    actual = kernels_memory.select(keys[None].to(DEVICE), ones, 3, 5, 8, 43).expiry[0].tolist()
    expected = memory_ops.heap_expiry(keys.tolist(), 3, 5)
    assert [math.inf if end >= memory_ops.NEVER else end for end in actual] == expected


@pytest.mark.parametrize("held, past, new", [(4, 3, 1), (4, 3, 12), (4, 3, 2), (2, 3, 9)])
def test_selection_continues_from_a_memory(held, past, new, deterministic):
    """Held tokens with holes between them, as a cache's slots have them."""
    generator = torch.Generator().manual_seed(held + new)
    keys = torch.randint(0, 4, (3, held + past + new), generator=generator).double()
    valid = torch.rand(keys.shape, generator=generator) < 0.7
    for block in (4, 16):
        assert_same_selection(keys, valid, 3, 4, block, new, held, past)


def test_no_token_has_left_yet():
    assert_same_selection(torch.zeros(2, 6), torch.ones(2, 6, dtype=torch.bool), 9, 3, 4, 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens, width, taps", [(1, 6, 4), (18, 300, 4), (3, 16, 7), (0, 8, 2)])
def test_output_innovation(dtype, tokens, width, taps, deterministic):
    """The predictions are the same sums in the same order; only the sums over the width are taken otherwise."""
    y, history = normal(2, tokens, width, dtype=dtype, grad=True), normal(2, taps, width, seed=1, dtype=dtype)
    strided = torch.cat([y, y], dim=-1)[..., width:]
    actual = kernels_memory.output_innovation(strided, history)
    assert not actual.requires_grad
    exact = dtype == torch.float64
    tolerance = dict(rtol=1e-12, atol=1e-12) if exact else dict(rtol=1e-6, atol=1e-6)
    assert_same([actual], [memory_ops.output_innovation(y, history)], **tolerance)


# Fading memory -------------------------------------------------------------------------------------------------------
CONV = [  # T, C, K, bias, history
    (1, 6, 4, True, True),
    (2, 20, 4, True, True),  # fewer tokens than taps
    (5, 6, 1, False, True),  # no history to speak of
    (9, 70, 3, False, False),  # more channels than a tile
    (34, 6, 4, True, True),  # more tokens than a tile
    (66, 6, 2, True, False),  # than a tile of the backward pass
    (62, 6, 4, True, True),  # with its history, than a tile of the backward pass
]


def conv_inputs(tokens, channels, taps, bias, history, dtype=torch.float64):
    x, weight = normal(2, tokens, channels, dtype=dtype), normal(channels, taps, seed=1, dtype=dtype)
    bias = normal(channels, seed=2, dtype=dtype) if bias else None
    return x, weight, bias, normal(2, taps - 1, channels, seed=3, dtype=dtype) if history else None


@pytest.mark.parametrize("sizes", CONV, ids=str)
def test_causal_conv(sizes, deterministic):
    inputs = conv_inputs(*sizes)
    actual, expected = (gradients(form, inputs) for form in (kernels_ssm.causal_conv, ssm_ops.causal_conv))
    assert_same(*(outputs + grads for outputs, grads in (actual, expected)))


def test_causal_conv_of_views_and_of_nothing():
    """The input is a part of a projection; a weight may be one too."""
    x, weight = normal(2, 7, 30)[..., 5:25], normal(4, 20).T
    torch.testing.assert_close(kernels_ssm.causal_conv(x, weight, None), ssm_ops.causal_conv(x, weight, None), **EXACT)
    nothing = x[:, :0]
    assert kernels_ssm.causal_conv(nothing, weight, None) is nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_causal_conv_in_low_precision(dtype):
    inputs = conv_inputs(12, 40, 4, True, True, dtype)
    exact = gradients(ssm_ops.causal_conv, [value.double() for value in inputs])
    ours, theirs = (gradients(form, inputs) for form in (kernels_ssm.causal_conv, ssm_ops.causal_conv))
    for truth, actual, floor in zip(*(outputs + grads for outputs, grads in (exact, ours, theirs)), strict=True):
        assert actual.dtype == dtype
        assert root_mean_square(actual - truth) < 1.5 * root_mean_square(floor - truth)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("channels, width", [(3, 5), (70, 64)])
@pytest.mark.parametrize("skip, started", [(True, True), (False, False)])
def test_one_token_of_the_recurrence(groups, channels, width, skip, started, deterministic):
    heads = 4
    dt, A = normal(2, 1, heads).abs(), -normal(heads, seed=1).abs()
    keys = [normal(2, 1, groups, width, seed=seed) for seed in (2, 3)]
    D = normal(heads, seed=4) if skip else None
    state = normal(2, heads, channels, width, seed=5) if started else None
    inputs = [normal(2, 1, heads, channels, seed=6), dt, A, *keys, D, state]
    actual, expected = (gradients(form, inputs) for form in (kernels_ssm.step_ssd, oracle_ssd))
    assert_same(*(outputs + grads for outputs, grads in (actual, expected)))


def test_step_takes_one_token_only():
    x, dt, A, keys = normal(1, 2, 2, 3), normal(1, 2, 2), normal(2), normal(1, 2, 1, 4)
    with pytest.raises(ValueError, match="2 tokens"):
        kernels_ssm.step_ssd(x, dt, A, keys, keys)
