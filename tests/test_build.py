"""`build`: what graph a list of requests becomes, and what it refuses."""

from collections.abc import Sequence
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_ir.build import Built, ByteTokenizer, build
from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.graph import CachedBlocks
from sagellm_ir.identity import BlockIds
from sagellm_ir.nodes import AllReduce, Location
from sagellm_ir.request import (
    ChatPrompt,
    Message,
    Request,
    TextPrompt,
    TokenPrompt,
    TracePrompt,
)
from sagellm_ir.target import DEVICE, ModelSpec, Target, Tier
from sagellm_ir.text import parse_graph, print_graph

# No deadline: a busy machine is not a bug.
QUICK = settings(deadline=None, max_examples=50)
SMALL = Target(block_size=4, tiers=(Tier(DEVICE, 8),))


def request(name: str, tokens: Sequence[int] = range(6), max_new: int = 3, **more: Any) -> Request:
    return Request(name, prompt=TokenPrompt(tuple(tokens)), max_new_tokens=max_new, **more)


def refusal(*requests: Request, target: Target = SMALL, **options: Any) -> str:
    with pytest.raises(SageIRError) as caught:
        build(requests, target, **options)
    return str(caught.value)


def order(built: Built) -> list[tuple[str, tuple[str, ...]]]:
    """Name and order edges of each node."""
    return [(node.name, node.after) for node in built.graph.nodes]


def test_one_prefill_and_one_decode_each() -> None:
    shared = list(range(8))
    built = build([request("a", [*shared, 9]), request("b", [*shared, 8, 8])], SMALL, name="g")
    text = print_graph(built.graph)
    assert text.splitlines()[text.splitlines().index("  tier @device {blocks = 8}") + 1 :] == [
        "  request @a {prompt = 9, blocks = [0, 1], max_new = 3}",
        "  request @b {prompt = 10, blocks = [0, 1], max_new = 3}",
        "",
        "  %a.p = prefill @a[0:9] : kv<9>",
        "  %a.d = decode @a[9:12](%a.p) : kv<12>",
        "  %b.p = prefill @b[0:10] : kv<10>",
        "  %b.d = decode @b[10:13](%b.p) : kv<13>",
        "}",
    ]
    assert built.graph.stage == "built"
    assert built.tokens == {"a": (*shared, 9), "b": (*shared, 8, 8)}
    assert parse_graph(text) == built.graph


def test_everything_known_of_a_request_is_declared() -> None:
    known: dict[str, Any] = {
        "arrival": 1.5,
        "priority": 2,
        "deadline": 9.0,
        "adapter": "x",
        "tenant": "t",
        "session": "s",
    }
    built = build([request("a", **known)], SMALL)
    (decl,) = built.graph.requests
    assert {name: getattr(decl, name) for name in known} == known
    assert (decl.prompt_len, decl.max_new_tokens, decl.stop) == (6, 3, 9)


def test_text_and_chat_go_through_the_tokenizer() -> None:
    chat = ChatPrompt((Message("user", "é"),))
    requests = [
        Request("t", prompt=TextPrompt("ab"), max_new_tokens=1),
        Request("c", prompt=chat, max_new_tokens=1),
    ]
    built = build(requests, Target(), tokenizer=ByteTokenizer())
    assert bytes(built.tokens["t"]) == b"ab"
    assert bytes(built.tokens["c"]).decode() == "<|user|>\né\n<|assistant|>\n"


def test_a_trace_has_blocks_and_no_tokens() -> None:
    trace = Request("a", prompt=TracePrompt((7, 8), 7, 4), max_new_tokens=1)
    built = build([trace], SMALL)
    assert built.tokens == {}
    (decl,) = built.graph.requests
    assert (decl.prompt_len, decl.blocks) == (7, (0,))


@QUICK
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), max_size=6))
def test_blocks_are_equal_exactly_when_prefixes_are(prompts: list[list[int]]) -> None:
    requests = [request(f"r{at}", tokens) for at, tokens in enumerate(prompts)]
    graph = build(requests, SMALL).graph
    for one in graph.requests:
        for two in graph.requests:
            same = [a == b for a, b in zip(one.blocks, two.blocks, strict=False)]
            tokens = (prompts[int(one.id[1:])], prompts[int(two.id[1:])])
            stops = [4 * (at + 1) for at in range(len(same))]
            assert same == [tokens[0][:stop] == tokens[1][:stop] for stop in stops]


@pytest.mark.parametrize("field", ["tenant", "adapter"])
def test_tenants_and_adapters_never_share(field: str) -> None:
    fields: list[dict[str, Any]] = [{field: name} for name in (None, "a", "b")]
    requests = [evolve(request("r"), id=f"r{at}", **more) for at, more in enumerate(fields)]
    blocks = [block for decl in build(requests, SMALL).graph.requests for block in decl.blocks]
    assert len(set(blocks)) == len(blocks) == 3


def test_models_never_share_in_one_numbering() -> None:
    ids = BlockIds(4)
    other = evolve(SMALL, model=ModelSpec(name="other"))
    first = build([request("a")], SMALL, block_ids=ids).graph.requests[0]
    second = build([request("a")], other, block_ids=ids).graph.requests[0]
    assert not set(first.blocks) & set(second.blocks)


def test_a_numbering_goes_on_over_calls() -> None:
    first = build([request("a")], SMALL)
    second = build([request("b")], SMALL, block_ids=first.block_ids)
    assert second.graph.requests[0].blocks == first.graph.requests[0].blocks
    with pytest.raises(ValueError, match="not 8"):
        build([], evolve(SMALL, block_size=8), block_ids=first.block_ids)


def test_the_cache_is_passed_on() -> None:
    cache = [CachedBlocks("host", blocks=(0,))]
    assert build([request("a")], SMALL, cache=cache).graph.cache == tuple(cache)


def test_no_requests() -> None:
    assert build([], SMALL).graph.nodes == ()


def test_turns_of_a_session_run_in_arrival_order() -> None:
    requests = [
        request("late", session="s", arrival=2.0),
        request("alone"),
        request("early", session="s", arrival=1.0),
        request("other", session="s", tenant="t", arrival=0.0),
        request("last", session="s", arrival=2.0),
    ]
    built = build(requests, SMALL)
    assert [decl.id for decl in built.graph.requests] == [r.id for r in requests]
    assert order(built) == [
        ("early.p", ()),
        ("early.d", ()),
        ("alone.p", ()),
        ("alone.d", ()),
        ("late.p", ("early.d",)),
        ("late.d", ()),
        ("other.p", ()),
        ("other.d", ()),
        ("last.p", ("late.d",)),
        ("last.d", ()),
    ]


@QUICK
@given(st.lists(st.tuples(st.sampled_from([None, "s", "t"]), st.integers(0, 3)), max_size=8))
def test_nodes_are_in_topological_order(turns: list[tuple[str | None, int]]) -> None:
    requests = [
        request(f"r{at}", session=session, arrival=float(arrival))
        for at, (session, arrival) in enumerate(turns)
    ]
    seen: set[str] = set()
    for node in build(requests, evolve(SMALL, tp=2)).graph.nodes:
        assert seen.issuperset(node.operands + node.after)
        seen.add(node.name)


def test_tensor_parallel_ranks_sum_after_every_row() -> None:
    target = evolve(SMALL, tp=2)
    built = build([request("a")], target)
    sums = [node for node in built.graph.nodes if isinstance(node, AllReduce)]
    assert [(n.name, n.operands, n.bytes, n.calls) for n in sums] == [
        ("a.p.sum", ("a.p",), 6 * 576 * 4, 60),
        ("a.d.sum", ("a.d",), 576 * 4, 60),
    ]
    assert parse_graph(print_graph(built.graph)) == built.graph


def test_locations_reach_declarations_and_nodes() -> None:
    loc = Location("a.jsonl", 3)
    graph = build([request("a")], SMALL, locations={"a": loc}).graph
    assert graph.requests[0].loc == loc
    assert {node.loc for node in graph.nodes} == {loc}


def test_names_are_plain_and_unique() -> None:
    ids = ["a", "a/b", "a b", "a_b", "r0#1", "é", "-x", ".", '"q"', "_q_", "a.p", "7"]
    built = build([request(name) for name in ids], SMALL)
    names = [node.name for node in built.graph.nodes]
    assert len(set(names)) == len(names) == 2 * len(ids)
    text = print_graph(built.graph)
    assert '%"' not in text
    assert parse_graph(text) == built.graph
    assert {"a.p", "a_b.p", "a.p.p", "7.p"} <= set(names)  # plain ids keep their names


def test_a_request_larger_than_the_pool() -> None:
    locations = {"big": Location("a.jsonl", 7)}
    assert refusal(request("big", range(30)), locations=locations) == (
        "a.jsonl:7:1: error: request 'big': it needs 9 blocks of 4 tokens (prompt 30 + max_new 3), "
        "and target 'cpu' has 8 on the device\n"
        "help: lower max_new_tokens, shorten the prompt or enlarge the tier"
    )
    assert len(build([request("fits", range(29))], SMALL).graph.nodes) == 2


def test_an_absurd_length_is_refused_before_blocks_are_numbered() -> None:
    trace = Request("a", prompt=TracePrompt((), 10**15, 10**16))
    assert "it needs 250000000000032 blocks" in refusal(trace)


def test_text_without_a_tokenizer() -> None:
    text = refusal(Request("a", prompt=TextPrompt("x")))
    assert "request 'a': its prompt is text, and there is no tokenizer" in text
    assert "ByteTokenizer()" in text


@pytest.mark.parametrize(
    "prompt", [TextPrompt(""), TokenPrompt(()), TracePrompt((), 0, 4)], ids=["text", "ids", "trace"]
)
def test_an_empty_prompt(prompt: Any) -> None:
    text = refusal(Request("a", prompt=prompt), tokenizer=ByteTokenizer())
    assert "request 'a': its prompt is empty" in text


@pytest.mark.parametrize("token", [49152, -1, 2**70])
def test_a_token_outside_the_vocabulary(token: int) -> None:
    text = refusal(request("a", [1, token]))
    assert f"token {token} is outside the vocabulary of smollm2-135m (49152)" in text


def test_an_id_used_twice() -> None:
    assert "request 'a': its id is used twice" in refusal(request("a"), request("a", [1]))


def test_a_trace_whose_blocks_do_not_fit_names_the_request() -> None:
    text = refusal(Request("a", prompt=TracePrompt((1,), 6, 6), max_new_tokens=1))
    assert "request 'a': the trace has blocks of 6 tokens, the target blocks of 4" in text
    assert "help: choose a block_size that divides 6 or is a multiple of it" in text


def test_all_wrong_requests_are_told_at_once_up_to_20() -> None:
    text = refusal(request("a", []), request("b"), request("c", [-1]))
    assert "'a'" in text
    assert "'b'" not in text
    assert "'c'" in text
    said = refusal(*(request(f"r{at}", []) for at in range(50)))
    assert said.count("its prompt is empty") == 20
    assert said.endswith("error: 30 more of 50 requests are wrong")
