"""Block identity: equal exactly when prefix and namespace are equal."""

from itertools import combinations, count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.identity import DIGEST_SIZE, BlockIds, Namespace, chain_hashes
from sagellm_ir.request import TracePrompt

# No deadline: a busy machine is not a bug.
QUICK = settings(deadline=None, max_examples=50)
HERE = Namespace("m")
# Few tokens and short prompts, so that prefixes really are equal now and then.
PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=24), min_size=2, max_size=6)
NAMES = st.sampled_from([None, "", "a", "b", "ab"])
NAMESPACES = st.builds(Namespace, st.sampled_from(["m", "n", ""]), NAMES, NAMES)


@QUICK
@given(PROMPTS, st.integers(1, 5), st.lists(NAMESPACES, min_size=6, max_size=6))
def test_equal_ids_exactly_for_equal_prefixes_in_one_namespace(
    prompts: list[list[int]], size: int, namespaces: list[Namespace]
) -> None:
    ids = BlockIds(size)
    blocks: dict[int, set[tuple[Namespace, tuple[int, ...]]]] = {}
    for prompt, namespace in zip(prompts, namespaces, strict=False):
        for at, block in enumerate(ids.of_tokens(prompt, namespace)):
            blocks.setdefault(block, set()).add((namespace, tuple(prompt[: (at + 1) * size])))
    for block, meanings in blocks.items():
        assert len(meanings) == 1, block
    assert len(blocks) == len(set.union(set(), *blocks.values()))


@QUICK
@given(PROMPTS, st.integers(1, 5), st.lists(NAMESPACES, min_size=6, max_size=6))
def test_what_was_hashed_lately_changes_no_identity(
    prompts: list[list[int]], size: int, namespaces: list[Namespace]
) -> None:
    ids = BlockIds(size)
    for prompt, namespace in zip(prompts, namespaces, strict=False):
        digests = chain_hashes(prompt, size, namespace)
        assert ids.of_tokens(prompt, namespace) == tuple(map(ids.of_digest, digests))


@QUICK
@given(st.lists(PROMPTS, min_size=1, max_size=4), st.integers(1, 5), st.data())
def test_numbers_are_those_of_one_table_whatever_is_read_late_or_forgotten(
    rounds: list[list[list[int]]], size: int, data: st.DataObject
) -> None:
    ids, table, fresh = BlockIds(size), dict[bytes, int](), count()
    for prompts in rounds:
        unread = [ids.unread(np.array(prompt, np.int64), HERE) for prompt in prompts]
        for at in data.draw(st.permutations(range(len(prompts)))):
            digests = chain_hashes(prompts[at], size, HERE)
            table.update(zip([d for d in digests if d not in table], fresh, strict=False))
            numbers, last = ids.read(unread[at])
            assert numbers == tuple(map(table.__getitem__, digests))
            assert last == (digests[-1] if digests else HERE.digest)
        kept = data.draw(st.sets(st.sampled_from(sorted(table.values())))) if table else set[int]()
        ids.keep(kept)
        table = {digest: number for digest, number in table.items() if number in kept}
        assert len(ids) == len(table)


@QUICK
@given(PROMPTS, st.integers(1, 5), st.lists(NAMESPACES, min_size=6, max_size=6))
def test_unread_prompts_start_alike_where_their_first_blocks_are_equal(
    prompts: list[list[int]], size: int, namespaces: list[Namespace]
) -> None:
    ids = BlockIds(size)
    pairs = list(zip(prompts, namespaces, strict=False))
    starts = [ids.unread(*pair).start for pair in pairs]
    firsts = [ids.of_tokens(*pair)[:1] for pair in pairs]
    for one, two in combinations(range(len(pairs)), 2):
        assert (starts[one] == starts[two]) == (firsts[one] == firsts[two])


@QUICK
@given(st.lists(st.integers(0, 2**32 - 1), max_size=64), st.integers(1, 9))
def test_one_digest_for_each_full_block(tokens: list[int], size: int) -> None:
    digests = chain_hashes(tokens, size, HERE)
    assert len(digests) == len(tokens) // size
    assert all(len(digest) == DIGEST_SIZE for digest in digests)
    assert chain_hashes(tokens[: len(digests) * size], size, HERE) == digests
    assert chain_hashes([*tokens, 1, 2, 3], size, HERE)[: len(digests)] == digests


@QUICK
@given(st.lists(NAMESPACES, min_size=2, max_size=4, unique=True))
def test_namespaces_never_share(namespaces: list[Namespace]) -> None:
    tokens = list(range(32))
    chains = [set(chain_hashes(tokens, 8, namespace)) for namespace in namespaces]
    for first, second in combinations(chains, 2):
        assert not first & second


def test_digests_do_not_change_between_versions() -> None:
    # They name blocks in stored caches: changing them is a format change.
    namespace = Namespace("smollm2-135m", tenant="t")
    assert [digest.hex() for digest in chain_hashes(range(8), 4, namespace)] == [
        "ecb83975c3671b3275c57a6355c764a6",
        "43116dcc947fc77964c1dc5f65bb6da0",
    ]


@pytest.mark.parametrize("tokens", [[0, -1], [2**32, 0], [2**70, 0]])
def test_tokens_out_of_range(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="from 0 to"):
        chain_hashes(tokens, 2, HERE)


def test_ids_are_small_and_in_order_of_sight() -> None:
    ids = BlockIds(2)
    assert ids.of_tokens([1, 2, 3, 4, 5], HERE) == (0, 1)
    assert ids.of_tokens([1, 2, 9, 9], HERE) == (0, 2)
    assert ids.of_trace(TracePrompt((5, 6), 4, 2), HERE) == (3, 4)
    assert ids.of_tokens([7, 7], HERE) == (5,)


def test_a_digest_that_an_engine_reports_has_the_same_id() -> None:
    ids = BlockIds(2)
    first, second = chain_hashes([1, 2, 3, 4], 2, HERE)
    assert ids.of_digest(second) == 0
    assert ids.of_tokens([1, 2, 3, 4], HERE) == (ids.of_digest(first), 0)


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(0, 40), st.integers(1, 8))
def test_an_answer_has_the_ids_of_the_next_turn(tokens: list[int], cut: int, size: int) -> None:
    cut = min(cut, len(tokens))
    ids = BlockIds(size)
    blocks, last = ids.of_prompt(tokens[:cut], HERE)
    rest = ids.of_rest(last, tokens[cut // size * size :])
    assert blocks + rest == ids.of_tokens(tokens, HERE)


def test_a_trace_counts_full_blocks_only() -> None:
    ids = BlockIds(512)
    assert len(ids.of_trace(TracePrompt((1, 2), 1024, 512), HERE)) == 2
    assert len(ids.of_trace(TracePrompt((1, 2), 1023, 512), HERE)) == 1
    assert ids.of_trace(TracePrompt((1,), 511, 512), HERE) == ()


@QUICK
@given(st.lists(NAMESPACES, min_size=2, max_size=2, unique=True))
def test_namespaces_of_a_trace_never_share(namespaces: list[Namespace]) -> None:
    ids = BlockIds(64)
    prompt = TracePrompt((1, 2, 3), 192, 64)
    first, second = (ids.of_trace(prompt, namespace) for namespace in namespaces)
    assert not set(first) & set(second)
    assert ids.of_trace(prompt, namespaces[0]) == first


def test_traces_of_two_block_sizes_do_not_share() -> None:
    ids = BlockIds(64)
    small = ids.of_trace(TracePrompt((1,), 64, 64), HERE)
    large = ids.of_trace(TracePrompt((1,), 64, 128), HERE)
    assert not set(small) & set(large)


# A trace is made from real token prompts: its ids are the chain hashes of its own block size. Seen
# through blocks of any other size that fits, it must share exactly what the prompts share.
@QUICK
@given(PROMPTS, st.sampled_from([(4, 4), (4, 2), (4, 1), (2, 4), (1, 4), (2, 6)]))
def test_other_block_sizes_keep_the_sharing(
    prompts: list[list[int]], sizes: tuple[int, int]
) -> None:
    given_size, size = sizes
    source, ids, truth = BlockIds(given_size), BlockIds(size), BlockIds(size)
    pairs = set()
    for prompt in prompts:
        full = prompt[: len(prompt) // given_size * given_size]
        trace = TracePrompt(source.of_tokens(full, HERE), len(full), given_size)
        found, true = ids.of_trace(trace, HERE), truth.of_tokens(full, HERE)
        assert len(found) == len(true)
        pairs |= set(zip(found, true, strict=True))
    # Smaller blocks inside a trace block that differs later cannot be told apart from it, so
    # equal found ids always mean equal truth; from the same size on, also the other way round.
    assert len({found for found, _ in pairs}) == len(pairs)
    if size >= given_size:
        assert len({true for _, true in pairs}) == len(pairs)


def test_blocks_a_trace_says_nothing_about_are_new() -> None:
    ids = BlockIds(16)
    prompt = TracePrompt((1,), 100, 64)
    first, second = ids.of_trace(prompt, HERE), ids.of_trace(prompt, HERE)
    assert len(first) == 6
    assert first[:4] == second[:4]
    assert not set(first[4:]) & set(second[4:])
    lengths_only = TracePrompt((), 32, 512)
    assert not set(ids.of_trace(lengths_only, HERE)) & set(ids.of_trace(lengths_only, HERE))


def test_block_sizes_that_do_not_fit() -> None:
    with pytest.raises(SageIRError, match="blocks of 512 tokens, the target blocks of 48"):
        BlockIds(48).of_trace(TracePrompt((1,), 512, 512), HERE)
