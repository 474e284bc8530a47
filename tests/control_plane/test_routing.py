"""Which engine a request goes to."""

import random
from typing import Any

import pytest
from attrs import define, evolve, field

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.request import ChatPrompt, Message, Request, TextPrompt
from sagellm_ir.runtime.control_plane.prefixes import BLOCK_BYTES, PrefixIndex, prompt_blocks
from sagellm_ir.runtime.control_plane.routing import Need, Router, accelerators

DOCUMENT = "".join(random.Random(1).choices("abcdefgh ", k=20 * BLOCK_BYTES))


@define
class Engine:
    engine_id: str
    active_requests: int = 0
    queue_length: int = 0
    metadata: dict[str, Any] = field(factory=dict)


def need(text: str, **fields: Any) -> Need:
    request = Request("r", prompt=TextPrompt(text))
    return Need(tuple(prompt_blocks(request, "m")), **fields)


def chosen(router: Router, need: Need, *engines: Engine) -> str:
    found = router.choose(need, engines)
    assert found is not None
    return found[0].engine_id


def fleet(count: int = 3) -> tuple[Engine, ...]:
    return tuple(Engine(f"e{number}") for number in range(count))


def test_new_prompts_spread_and_known_ones_return() -> None:
    router, engines = Router(), fleet()
    texts = [f"{number}{DOCUMENT}" for number in range(3)]
    homes = [chosen(router, need(text), *engines) for text in texts]
    assert sorted(homes) == ["e0", "e1", "e2"]
    for _ in range(3):
        for text, home in zip(texts, homes, strict=True):
            assert chosen(router, need(text + "and more"), *engines) == home


def test_the_longest_prefix_wins() -> None:
    router, (short, long) = Router(), fleet(2)
    router.index.add("e0", need(DOCUMENT[: 5 * BLOCK_BYTES]).blocks)
    router.index.add("e1", need(DOCUMENT[: 6 * BLOCK_BYTES]).blocks)
    short.active_requests, long.active_requests = 0, router.slack
    found = router.choose(need(DOCUMENT), (short, long))
    assert found == (long, "holds 6 of 20 blocks")


def test_a_busy_engine_gives_way() -> None:
    router, (idle, busy) = Router(), fleet(2)
    router.index.add("e1", need(DOCUMENT).blocks)
    busy.queue_length = router.slack + 1
    assert chosen(router, need(DOCUMENT), idle, busy) == "e0"
    # It holds the prompt now too, so the group does not wander back and forth.
    busy.queue_length = 0
    assert chosen(router, need(DOCUMENT), idle, busy) in ("e0", "e1")


def test_accelerators_asked_for_come_first() -> None:
    cpu, ascend, cambricon = fleet()
    for engine, device in ((cpu, "cpu"), (ascend, "ascend"), (cambricon, "cambricon")):
        engine.metadata["capability"] = {"device": device}
    router = Router()
    router.index.add("e0", need(DOCUMENT).blocks)
    domestic = accelerators("domestic")
    assert chosen(router, need(DOCUMENT), cpu, ascend, cambricon) == "e0"
    assert chosen(router, need(DOCUMENT, prefer=domestic), cpu, ascend, cambricon) == "e1"
    assert chosen(router, need(DOCUMENT, prefer=domestic), cpu, cambricon) == "e2"
    assert chosen(router, need(DOCUMENT, prefer=domestic), cpu) == "e0"
    always = evolve(router, prefer=("cambricon",))
    assert chosen(always, need(DOCUMENT), cpu, ascend, cambricon) == "e2"


def test_engines_of_one_phase_serve_whole_requests_only_alone() -> None:
    general, prefilling = fleet(2)
    prefilling.metadata["instance_type"] = "prefilling"
    router = Router()
    router.index.add("e1", need(DOCUMENT).blocks)
    assert chosen(router, need(DOCUMENT), general, prefilling) == "e0"
    assert chosen(router, need(DOCUMENT), prefilling) == "e1"


def test_excluded_engines_are_not_chosen() -> None:
    router = Router()
    assert chosen(router, need("x", excluded=frozenset({"e0"})), *fleet(2)) == "e1"
    assert router.choose(need("x", excluded=frozenset({"e0", "e1"})), fleet(2)) is None


def test_round_robin_takes_turns() -> None:
    router = Router("round_robin")
    homes = [chosen(router, need(DOCUMENT), *fleet()) for _ in range(6)]
    assert homes == ["e0", "e1", "e2"] * 2


def test_tenants_and_adapters_share_nothing() -> None:
    plain = Request("r", prompt=TextPrompt(DOCUMENT))
    kinds = (
        plain,
        evolve(plain, tenant="a"),
        evolve(plain, tenant="b"),
        evolve(plain, adapter="a"),
    )
    first = {prompt_blocks(request, "m")[0] for request in kinds}
    assert len(first) == len(kinds)


def test_the_next_turn_of_a_chat_starts_with_the_answer() -> None:
    question = Message("user", DOCUMENT)
    first = Request("r", prompt=ChatPrompt((question,)))
    answer = "a long answer " * 20
    turns = (question, Message("assistant", answer), Message("user", "and then?"))
    second = Request("r", prompt=ChatPrompt(turns))
    index = PrefixIndex()
    index.add("e", prompt_blocks(first, "m", answer))
    blocks = prompt_blocks(second, "m")
    assert index.longest("e", blocks) >= len(blocks) - 1


def test_the_index_forgets_leaves_before_their_parents() -> None:
    index, blocks = PrefixIndex(), need(DOCUMENT).blocks
    index.add("e", blocks, limit=10)
    assert index.longest("e", blocks) == index.size("e") == 10
    other = need("z" + DOCUMENT).blocks
    index.add("e", other, limit=25)
    assert index.longest("e", other) == 20
    assert index.longest("e", blocks) == 5
    index.forget("e")
    assert index.longest("e", blocks) == index.size("e") == 0


@pytest.mark.parametrize("word", ["ascnd", "gpu"])
def test_unknown_accelerators_are_refused(word: str) -> None:
    with pytest.raises(SageIRError, match=word):
        accelerators(word)


def test_unknown_routings_are_refused() -> None:
    with pytest.raises(SageIRError, match="did you mean 'longest_prefix'"):
        Router("longest-prefix")
