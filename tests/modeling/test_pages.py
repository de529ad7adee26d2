"""Pages of a layer's entries: random histories against lists of lists, shared pages, undefined places, refusals.

The oracle keeps every row as a list of numbers and knows nothing of pages.
"""

import copy
import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_bmojo.pages_bmojo import Field, Pages
from modeling_bmojo.pools_bmojo import Overlay, Pool


P, G, D = 4, 2, 3
FIELDS = {"keys": Field((G, D), torch.float32), "clocks": Field((), torch.float64)}


class Frozen(Pool):
    """A pool whose copies are overlays, as a pool in files is."""

    def forked(self):
        return Overlay(self)


def new(batch=1, pool=None):
    return Pages(FIELDS, batch, P, pool=pool)


def entries(numbers) -> dict[str, torch.Tensor]:
    """Entries `[B, T]` that hold their number and, head by head and channel by channel, what tells them apart."""
    clocks = torch.as_tensor(numbers, dtype=torch.float64)
    part = torch.arange(G * D, dtype=torch.float32).view(G, D) / 8
    return {"keys": clocks.float()[..., None, None] + part, "clocks": clocks}


def check(pages: Pages, rows: list[list[int]]) -> None:
    """Every way of reading says what the rows hold."""
    assert pages.lengths == tuple(map(len, rows))
    longest = max(map(len, rows), default=0)
    assert pages.length == longest
    if not longest:
        return
    wanted = entries([row + [0] * (longest - len(row)) for row in rows])
    real = torch.arange(longest) < torch.tensor(pages.lengths)[:, None]
    for upto in {longest, (longest + 1) // 2}:
        keys, clocks = pages.dense("keys", upto), pages.dense("clocks", upto)
        assert keys.shape == (len(rows), G, upto, D)
        assert torch.equal(keys.transpose(1, 2)[real[:, :upto]], wanted["keys"][:, :upto][real[:, :upto]])
        assert torch.equal(clocks[real[:, :upto]], wanted["clocks"][:, :upto][real[:, :upto]])
    generator = random.Random(longest)
    lengths = [len(row) or 1 for row in rows]
    place = torch.tensor([[[generator.randrange(n) for _ in range(7)] for _ in range(G)] for n in lengths])
    filled = torch.tensor([len(row) > 0 for row in rows])
    apart = place.transpose(0, 2).contiguous().transpose(0, 2)  # as a caller's may lie in memory
    found, whole = pages.read("keys", apart), pages.read("clocks", place[:, 0])
    by_head = wanted["keys"].transpose(1, 2).gather(2, place[..., None].expand(-1, -1, -1, D))
    assert torch.equal(found[filled], by_head[filled])
    assert torch.equal(whole[filled], wanted["clocks"].gather(1, place[:, 0])[filled])


def consistent(pool: Pool, everyone: list[Pages]) -> None:
    """References are counted exactly, and a page is free or in use."""
    pool.collect()
    counts = [0] * len(pool.references)
    for pages in everyone:
        for row in pages.table:
            for page in row:
                if pool.shift <= page < pool.shift + len(counts):
                    counts[page - pool.shift] += 1
    assert pool.references == counts
    assert sorted(page - pool.shift for page in pool.free) == [i for i, count in enumerate(counts) if not count]


# Histories -----------------------------------------------------------------------------------------------------------
SIZES = st.sampled_from([0, 1, 1, 1, 2, P - 1, P, P + 1, 2 * P, 3 * P + 1])
WRITE = st.tuples(st.just("write"), st.integers(0, 7), SIZES, st.integers(0, 2 * P))
SELECT = st.tuples(st.just("select"), st.integers(0, 7), st.lists(st.integers(0, 7), min_size=1, max_size=4))
OTHERS = st.tuples(st.sampled_from(["copy", "deepcopy", "clear", "drop", "pickle", "joined"]), st.integers(0, 7))
CUT = st.tuples(st.just("cut"), st.integers(0, 7), st.integers(0, 2 * P))
HISTORIES = st.lists(st.one_of(WRITE, WRITE, WRITE, SELECT, OTHERS, CUT), max_size=10)


def play(history, pages: Pages, serial: int = 1) -> list[tuple[Pages, list[list[int]]]]:
    """Let a history happen to pages and to lists; returns whatever is alive at the end."""
    alive = [(pages, [[] for _ in range(pages.batch)])]
    for action, which, *rest in history:
        pages, rows = alive[which % len(alive)]
        if action == "write":
            count, back = rest
            firsts = [max(len(row) - back * (b + 1) // 2, 0) for b, row in enumerate(rows)]
            numbers = [[serial + b * count + t for t in range(count)] for b in range(len(rows))]
            serial += len(rows) * count
            even = len(set(firsts)) == 1
            pages.write(
                firsts[0] if even else torch.tensor(firsts),
                **entries(torch.tensor(numbers, dtype=torch.float64).view(len(rows), count)),
            )
            for row, first, more in zip(rows, firsts, numbers):
                row[first : first + count] = more
        elif action == "select":
            index = [b % len(rows) for b in rest[0]]
            pages.select(torch.tensor(index))
            rows[:] = [list(rows[b]) for b in index]
        elif action == "cut":
            lengths = [max(len(row) - rest[0] * b, 0) for b, row in enumerate(rows, 1)]
            pages.cut(lengths)
            rows[:] = [row[:n] for row, n in zip(rows, lengths)]
        elif action == "clear":
            pages.clear()
            rows[:] = [[] for _ in rows]
        elif action == "drop":
            if len(alive) > 1:
                del alive[which % len(alive)]
        elif action == "joined":
            if len(rows) <= 4:
                alive.append((Pages.joined([pages, alive[0][0]]), [list(row) for row in rows + alive[0][1]]))
        else:
            make = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda p: pickle.loads(pickle.dumps(p))}
            alive.append((make[action](pages), [list(row) for row in rows]))
        check(*alive[which % len(alive)])
    for each, wanted in alive:
        check(each, wanted)
    return alive


@settings(max_examples=300, deadline=None)
@given(HISTORIES, st.integers(1, 3))
def test_any_history_is_what_lists_say(history, batch):
    pages = new(batch)
    alive = play(history, pages)
    del pages
    for pool in {id(each.pool): each.pool for each, _ in alive}.values():
        consistent(pool, [each for each, _ in alive if each.pool is pool])


@settings(max_examples=200, deadline=None)
@given(HISTORIES, st.integers(1, 3))
def test_any_history_over_pages_that_copies_only_read(history, batch):
    """The same where a copy keeps what it writes itself elsewhere, as a copy of pages in files does."""
    base = Frozen(FIELDS, P)
    pages = new(batch, base)
    alive = play(history, pages)
    del pages
    overlays = {id(each.pool): each.pool for each, _ in alive if isinstance(each.pool, Overlay)}
    for pool in overlays.values():
        consistent(pool, [each for each, _ in alive if each.pool is pool])
    consistent(base, [each for each, _ in alive if each.pool is base or getattr(each.pool, "base", None) is base])


# Pages ---------------------------------------------------------------------------------------------------------------
def test_a_single_row_is_read_without_a_copy():
    pages = new()
    pages.write(0, **entries([list(range(3 * P + 1))]))
    view = pages.dense("keys", 2 * P + 3)
    assert view.data_ptr() == pages.pool.data["keys"].data_ptr()
    pages.write(3 * P + 1, **entries([[99]]))
    assert torch.equal(view[0, 0, :, 0], torch.arange(2 * P + 3.0))


def test_forks_share_pages_and_copy_the_open_one():
    """Four rows from one of 3 full pages and an open one: 3 pages shared, and one of its own for each that writes."""
    pages = new()
    pages.write(0, **entries([list(range(3 * P + 2))]))
    one = pages.pool.page_bytes
    assert pages.nbytes == 4 * one
    pages.select([0, 0, 0, 0])
    assert pages.nbytes == 4 * one
    pages.write(3 * P + 2, **entries([[100], [200], [300], [400]]))
    assert pages.nbytes == (3 + 4) * one
    pages.select([2])
    assert pages.nbytes == 4 * one
    check(pages, [[*range(3 * P + 2), 300]])


def test_pages_that_nobody_refers_to_are_taken_again():
    pages = new()
    pages.write(0, **entries([list(range(8 * P))]))
    size = len(pages.pool.references)
    for n in range(20):
        other = copy.deepcopy(pages)
        other.write(0, **entries([list(range(n, n + 8 * P))]))
        del other
        pages.clear(2)
        pages.write(0, **entries([list(range(n, n + 4 * P)), list(range(4 * P))]))
        pages.clear(1)
        pages.write(0, **entries([list(range(8 * P))]))
    assert len(pages.pool.references) <= 2 * size


def test_a_pool_grows_by_shares_of_itself():
    """One entry at a time, 4,096 entries move the pool a few times and not once per page."""
    pages, places = Pages(FIELDS, 1, 1), set()
    for s in range(4096):
        pages.write(s, **entries([[s]]))
        places.add(pages.pool.capacity)
    assert len(places) < 24
    check(pages, [list(range(4096))])


def test_what_is_undefined_is_the_row_s_own():
    """Nothing of a row that was given back is seen behind the end of another."""
    pages = new(2)
    pages.write(0, **entries([[7777] * 3 * P, [8888] * 3 * P]))
    pages.clear(1)
    pages.write(0, **entries([[1]]))
    for upto in (P, 3 * P):
        assert set(pages.dense("clocks", upto)[0].tolist()) <= {0.0, 1.0}
    assert set(pages.read("clocks", torch.arange(P)[None])[0].tolist()) <= {0.0, 1.0}
    pages.select([0, 0])
    pages.write(1, **entries([[2] * 2 * P, [3] * 2 * P]))
    pages.cut([2 * P, 1])
    assert set(pages.read("clocks", torch.arange(2 * P)[None].expand(2, -1))[1].tolist()) <= {0.0, 1.0, 3.0}


def test_entries_take_the_dtype_of_the_field_and_no_gradient():
    fields = {"keys": Field((G, D), torch.bfloat16)}
    pages, keys = Pages(fields, 1, P), torch.randn(1, 5, G, D, requires_grad=True)
    pages.write(0, keys=keys)
    dense = pages.dense("keys", 5)
    assert dense.dtype == torch.bfloat16 and not dense.requires_grad
    assert torch.equal(dense.transpose(1, 2), keys.detach().bfloat16())


def test_what_inference_mode_wrote_is_continued_outside():
    pages = new()
    with torch.inference_mode():
        pages.write(0, **entries([list(range(P + 1))]))
        check(pages, [list(range(P + 1))])
    pages.write(P + 1, **entries([list(range(P))]))
    keys = pages.read("keys", torch.zeros(1, G, 1, dtype=torch.int64))
    assert not keys.is_inference()
    check(pages, [[*range(P + 1), *range(P)]])


def test_a_write_that_finds_no_room_changes_nothing():
    class Small(Pool):
        def grow(self, least):
            if least > 4:
                raise OSError(28, "no room")
            super().grow(least)

    pages = new(2, Small(FIELDS, P))
    pages.write(0, **entries([list(range(P + 1)), list(range(P + 1))]))
    with pytest.raises(OSError, match="no room"):
        pages.write(P + 1, **entries([list(range(2 * P))] * 2))
    check(pages, [list(range(P + 1))] * 2)
    pages.write(P + 1, **entries([[5], [6]]))
    check(pages, [[*range(P + 1), 5], [*range(P + 1), 6]])


# Refusals ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong, what",
    [
        (lambda p: p.write(2, **entries([[1], [1]])), r"first=2 of row 0: must lie in \[0, 1\]"),
        (lambda p: p.write(torch.tensor([1, -1]), **entries([[1], [1]])), "first=-1 of row 1"),
        (lambda p: p.write(1, keys=entries([[1], [1]])["keys"]), r"fields \['keys'\]: must be \['clocks', 'keys'\]"),
        (lambda p: p.write(1, **entries([[1]])), r"keys of shape \[1, 1, 2, 3\]: must be \[2, 1, 2, 3\]"),
        (lambda p: p.select([0, 2]), r"index=\[0, 2\]: must lie in \[0, 1\]"),
        (lambda p: p.cut([1, 2]), r"lengths=\[1, 2\]: must lie in"),
        (lambda p: p.cut([1]), r"lengths=\[1\]"),
        (lambda p: Pages.joined([p, Pages(FIELDS, 1, P + 1)]), "in pages of 5: must be"),
        (lambda p: new().read("clocks", torch.zeros(1, 1, dtype=torch.int64)), "nothing has been written"),
        (lambda p: new().dense("clocks", 1), "nothing has been written"),
        (lambda p: Pages(FIELDS, 1, 0), "page=0: must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(wrong, what):
    pages = new(2)
    pages.write(0, **entries([[3], [4]]))
    with pytest.raises(ValueError, match=what):
        wrong(pages)
    check(pages, [[3], [4]])
