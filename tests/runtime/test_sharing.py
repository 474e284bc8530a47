"""Who shares which blocks: the tree says what a comparison of all tables says."""

from hypothesis import given
from hypothesis import strategies as st

from sagellm_ir.lowering.plan import PrefixGroup
from sagellm_ir.runtime.sharing import SharedTables, shared_starts

SIZE = 4
PATHS = st.lists(st.integers(0, 2), max_size=6).map(tuple)


def table(path: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks of a path: equal exactly where all before is equal, as KV blocks are."""
    return tuple(hash(path[: at + 1]) for at in range(len(path)))


def shared(rows: dict[str, tuple[int, ...]]) -> set[tuple[int, int, frozenset[str]]]:
    """Of each set of two or more rows that some block has: the span that just these have."""
    spans: dict[frozenset[str], list[int]] = {}
    for blocks in rows.values():
        for at, block in enumerate(blocks):
            having = frozenset(n for n, other in rows.items() if other[at : at + 1] == (block,))
            if len(having) > 1:
                spans.setdefault(having, []).append(at)
    return {(min(at) * SIZE, (max(at) + 1) * SIZE, who) for who, at in spans.items()}


@given(st.lists(st.tuples(st.integers(0, 5), PATHS)))
def test_groups_are_what_the_tables_share(moves: list[tuple[int, tuple[int, ...]]]) -> None:
    tree, rows = SharedTables(SIZE), dict[str, tuple[int, ...]]()
    for number, path in moves:
        name = f"r{number}"
        if name in rows:
            tree.leave(name)
            del rows[name]
        else:
            rows[name] = table(path)
            tree.enter(name, rows[name])
        groups = tree.groups()
        assert {(g.start, g.stop, frozenset(g.requests)) for g in groups} == shared(rows)
        assert tree.blocks == len({block for blocks in rows.values() for block in blocks})
        for at, group in enumerate(groups):
            above = [other for other in groups[:at] if other.stop == group.start]
            assert not group.start or any({*group.requests} <= {*o.requests} for o in above)


def test_tables_that_part_and_meet_again_share_their_start_only() -> None:
    tree = SharedTables(SIZE)
    tree.enter("a", (1, 2, 3, 4))
    tree.enter("b", (1, 9, 3, 8))
    assert tree.groups() == (PrefixGroup(0, SIZE, ("a", "b")),)


@given(st.lists(PATHS), st.sampled_from((1, 64)))
def test_long_tables_are_compared_with_the_ones_before(
    paths: list[tuple[int, ...]], times: int
) -> None:
    tables = [tuple(block for block in table(path) for _ in range(times)) for path in paths]
    wanted, before = list[int](), tuple[int, ...]()
    for blocks in tables:
        pairs = enumerate(zip(blocks, before, strict=False))
        wanted.append(next((at for at, (a, b) in pairs if a != b), min(len(blocks), len(before))))
        before = blocks
    short = max(map(len, tables), default=0) < 64
    assert shared_starts(tables) == ([0] * len(tables) if short else wanted)
