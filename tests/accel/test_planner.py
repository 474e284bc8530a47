"""The host's part: groups -> nodes -> work list. No kernel runs here."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.plan import PrefixGroup
from sagellm_ir.runtime.accel import forest
from sagellm_ir.runtime.accel.division import Private
from sagellm_ir.runtime.accel.forest import (
    Ints,
    SharedPrefix,
    find_groups,
    plan_forest,
    shared_prefixes,
)
from sagellm_ir.runtime.accel.gate import Gate
from sagellm_ir.runtime.accel.spec import AttentionSpec
from sagellm_ir.runtime.accel.tiles import tile_for, tile_heights
from sagellm_ir.runtime.accel.worklist import Limits, SharedWork, plan_shared

SPEC = AttentionSpec(14, 2, 128, 16)
LLAMA = AttentionSpec(32, 8, 128, 64)
LIMITS = Limits(sms=132, items=4096, rows=4096, where=65536, parts=1 << 16)


def ints(*values: int) -> Ints:
    return np.array(values, np.int32)


@st.composite
def tables(draw: st.DrawFn) -> tuple[Ints, Ints]:
    """Block tables of a random trie, and how many tokens of each row are old."""
    batch = draw(st.integers(1, 8))
    width = 6
    table = np.zeros((batch, width), np.int32)
    names: dict[tuple[int, ...], int] = {}
    for row in range(batch):
        path = draw(st.lists(st.integers(0, 1), min_size=width, max_size=width))
        for column in range(width):
            key = (*path[: column + 1],)
            table[row, column] = names.setdefault(key, len(names))
    old = draw(st.lists(st.integers(0, width * 16), min_size=batch, max_size=batch))
    return table, ints(*old)


@given(tables())
def test_found_groups_are_all_that_rows_share(case: tuple[Ints, Ints]) -> None:
    table, old = case
    groups = find_groups(table, old, 16)
    shared = np.zeros((len(old), len(old)), int)
    for group in groups:
        assert len(group.rows) > 1
        rows = np.asarray(group.rows)
        shared[np.ix_(rows, rows)] = group.stop
    for a in range(len(old)):
        for b in range(a):
            same = table[a] == table[b]
            agree = 6 if same.all() else int(same.argmin())
            assert shared[a, b] == 16 * min(agree, old[a] // 16, old[b] // 16)


NEW = st.just([1] * 8) | st.lists(st.integers(1, 5), min_size=8, max_size=8)


@given(tables(), NEW, st.booleans())
@settings(max_examples=60)
def test_spans_and_partials_cover_every_key_once(
    case: tuple[Ints, Ints], new: list[int], strict: bool
) -> None:
    """Nodes on a sequence's path abut from 0 to its private part, in the order of its partials."""
    table, old = case
    q_lens = ints(*new[: len(old)])
    gate = Gate(launch=0.0, node=2e-3, bandwidth=1e30, reread=1e8) if strict else None
    forest = plan_forest(SPEC, find_groups(table, old, 16), q_lens, old + q_lens, gate)
    q_start = np.append(0, np.cumsum(q_lens)).astype(np.int32)
    work = plan_shared(SPEC, forest, q_start, Gate(), LIMITS)
    if not forest.nodes:
        assert work is None
        return
    assert work is not None
    # What each partial is: (query token, head of the group, first key, end).
    written: dict[int, tuple[int, int, int, int]] = {}
    for owner, lo, hi, _, first, count, tile, part in work.items.tolist():
        for r in range(tile * work.tile_rows, min((tile + 1) * work.tile_rows, count * SPEC.group)):
            query = int(work.rows[first + r // SPEC.group])
            assert part + r not in written
            written[part + r] = (query, r % SPEC.group, lo, hi)
            mine, pages = np.searchsorted(q_start, query, "right") - 1, slice(lo // 16, hi // 16)
            assert (table[mine, pages] == table[owner, pages]).all()
    assert written.keys() == set(range(work.parts))
    for seq in range(len(old)):
        for turn, query in enumerate(range(q_start[seq], q_start[seq + 1])):
            at = 0
            entry = work.where_start[seq] + turn * work.slots[seq]
            for place in work.where[entry : entry + work.slots[seq]].tolist():
                for head in range(SPEC.group):
                    assert written[place + head] == (query, head, at, written[place][3])
                at = written[place][3]
            assert at == forest.private[seq] <= old[seq]


def test_groups_of_a_plan_step() -> None:
    groups = [PrefixGroup(0, 32, ("a", "b", "c")), PrefixGroup(32, 64, ("a", "c"))]
    places = {"a": 0, "b": 2, "d": 1, "c": 3}
    made = shared_prefixes(groups, places, [39, 8, 63])  # "c" is not in the batch
    assert made == [SharedPrefix(0, 32, [0, 2])]
    assert shared_prefixes(groups, places, [39, 8, 31]) == []
    assert shared_prefixes(groups, {"a": 0, "c": 1}, [64, 65]) == [
        SharedPrefix(0, 32, [0, 1]),
        SharedPrefix(32, 64, [0, 1]),
    ]
    assert plan_forest(SPEC, made, ints(1, 1, 1), ints(40, 9, 64), None).private.tolist() == [
        32,
        0,
        32,
    ]


def test_a_node_that_does_not_pay_is_read_with_its_children() -> None:
    """The root (one block) does not pay alone; with a child's tokens it does."""
    groups = [SharedPrefix(0, 64, range(4)), SharedPrefix(64, 16384, (0, 1, 2))]
    q_lens, kv_lens = ints(1, 1, 1, 1), ints(16400, 16500, 16600, 100)
    forest = plan_forest(LLAMA, groups, q_lens, kv_lens, Gate())
    assert [(node.begin, node.end) for node in forest.nodes] == [(0, 16384)]
    assert forest.private.tolist() == [16384, 16384, 16384, 0]


def test_the_gate_knows_when_sharing_pays() -> None:
    gate = Gate()
    assert gate.saved(LLAMA, 32, 32, 32768) > 100e-6
    assert gate.saved(LLAMA, 2, 2, 64) < gate.launch
    # 512 new tokens of each sequence fill their own tiles: nothing is gained.
    assert gate.saved(LLAMA, 4 * 512, 4, 8192) <= 1e-6
    # Gains below the cost of one more launch are no gains.
    small = [SharedPrefix(0, 128, (0, 1))]
    assert not plan_forest(LLAMA, small, ints(1, 1), ints(200, 200), gate).nodes
    assert plan_forest(LLAMA, small, ints(1, 1), ints(200, 200), None).nodes


def test_tiles_leave_room_for_the_private_part_unless_arithmetic_or_bandwidth_decides() -> None:
    gate = Gate()
    assert gate.tile_rows(LLAMA, [(8, 4096)]) == 64  # 32 rows would do, and fill an SM's registers
    assert gate.tile_rows(LLAMA, [(32, 4096)]) == 64
    assert gate.tile_rows(LLAMA, [(256, 32768)]) == 128
    assert gate.tile_rows(LLAMA, [(8, 1 << 17)]) == 32


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ([SharedPrefix(0, 8, (0, 1))], "whole blocks"),
        ([SharedPrefix(16, 16, (0, 1))], "empty"),
        ([SharedPrefix(0, 16, (0, 2))], "0 to 1"),
        ([SharedPrefix(0, 16, ())], "0 to 1"),
        ([SharedPrefix(0, 16, (1, 1))], "twice"),
        ([SharedPrefix(16, 32, (0, 1))], "does not continue"),
        ([SharedPrefix(0, 16, (0, 1)), SharedPrefix(0, 32, (0, 1))], "does not continue"),
        ([SharedPrefix(0, 16, (0,)), SharedPrefix(0, 16, (1,)), SharedPrefix(16, 32, (0, 1))], "does not"),
        ([SharedPrefix(0, 48, (0, 1))], "new tokens"),
    ],
)  # fmt: skip
def test_bad_groups_are_refused(groups: list[SharedPrefix], problem: str) -> None:
    with pytest.raises(SageIRError, match=problem):
        plan_forest(SPEC, groups, ints(4, 1), ints(48, 64), None)


ROWS = st.lists(st.integers(-1, 4), max_size=3)
SPANS = st.sampled_from(
    [(0, 16), (0, 32), (16, 32), (16, 48), (32, 48), (0, 0), (8, 16), (-16, 16)]
)


@given(st.lists(st.tuples(SPANS, ROWS), min_size=1, max_size=4))
@example([((0, 16), [0, 1, 2]), ((16, 32), [1, 2]), ((32, 48), [1, 2]), ((16, 48), [0])])
@settings(max_examples=500)
def test_groups_checked_all_at_once_and_one_by_one(
    given: list[tuple[tuple[int, int], list[int]]],
) -> None:
    """What refuses groups says the same as what says why."""
    ordered = sorted(given, key=lambda one: one[0][0])
    groups = [SharedPrefix(start, stop, rows) for (start, stop), rows in ordered]
    lists = [ints(*group.rows) for group in groups]
    history = ints(48, 47, 64, 16)
    outer = forest._outer(SPEC, groups, np.concatenate(lists), [*map(len, lists)], history)
    if outer is None:
        assert forest._why(SPEC, groups, lists, history).message
        return
    with pytest.raises(AssertionError, match="all groups keep the rules"):
        forest._why(SPEC, groups, lists, history)
    for group, above in zip(groups, outer, strict=True):
        assert group.start == (groups[above].stop if above >= 0 else 0)
        assert above < 0 or set(group.rows) <= set(groups[above].rows)


def test_work_that_does_not_fit_is_not_shared() -> None:
    forest = plan_forest(SPEC, [SharedPrefix(0, 32, (0, 1))], ints(1, 1), ints(40, 40), None)
    q_start = ints(0, 1, 2)
    for tight in ("items", "rows", "where", "parts"):
        fields = {"sms": 1, "items": 9, "rows": 9, "where": 9, "parts": 99, tight: 0}
        assert plan_shared(SPEC, forest, q_start, Gate(), Limits(**fields)) is None


def test_the_chunk_fills_the_device() -> None:
    """One group of 8 rows over 128K keys: without cuts, 8 programs would do all the work."""
    groups = [SharedPrefix(0, 131072, range(8))]
    forest = plan_forest(LLAMA, groups, np.ones(8, np.int32), np.full(8, 131200, np.int32), None)
    work = plan_shared(LLAMA, forest, np.arange(9, dtype=np.int32), Gate(), LIMITS)
    assert work is not None
    programs = len(work.items) * LLAMA.kv_heads
    assert programs >= 132


def plan(spec: AttentionSpec, batch: int, tokens: int, own: int, private: int) -> SharedWork:
    """One group, `own` private keys of each sequence; `private` of all may be read meanwhile."""
    groups = [SharedPrefix(0, tokens, range(batch))]
    total = np.full(batch, tokens + own, np.int32)
    forest = plan_forest(spec, groups, np.ones(batch, np.int32), total, None)
    starts = np.arange(batch + 1, dtype=np.int32)
    parts = Private(private, own, batch, batch, 4) if private else None
    work = plan_shared(spec, forest, starts, Gate(), LIMITS, parts)
    assert work is not None
    return work


def test_sms_are_divided_between_arithmetic_and_memory() -> None:
    """SMs with shared keys are busy to the end; the longer the private parts, the fewer they are."""
    few = plan(LLAMA, 256, 32768, 64, 256 * 64)
    many = plan(LLAMA, 256, 32768, 2048, 256 * 2048)
    assert many.left > few.left
    for work in (few, many):
        assert work.tile_rows == 128
        assert work.programs + work.left == LIMITS.sms
        assert work.private_cuts > 0
        items = len(work.items) * LLAMA.kv_heads
        rounds = -(-items // work.programs)
        assert rounds * work.programs - items < rounds
    # Without private keys to read meanwhile, or where memory decides, all SMs share.
    assert plan(LLAMA, 256, 32768, 64, 0).left == 0
    assert plan(LLAMA, 256, 32768, 64, 0).private_cuts == 0
    assert plan(AttentionSpec(32, 32, 128, 64), 8, 1 << 17, 1024, 8 * 1024).left == 0


def test_long_private_parts_are_cut_for_the_sms_that_are_left() -> None:
    """64 parts of 4 KV heads in one piece each would keep some programs of 52 SMs busy twice."""
    work = plan(AttentionSpec(28, 4, 128, 64), 64, 32768, 1024, 64 * 1024)
    assert work.left > 0
    assert work.private_cuts > 1


def test_tiles_grow_with_the_rows() -> None:
    for spec in (SPEC, LLAMA, AttentionSpec(4, 1, 256, 16, kv="int8")):
        heights = tile_heights(spec)
        assert [tile_for(spec, rows).rows for rows in heights] == list(heights)
        assert tile_for(spec, 100_000).rows == heights[-1]
