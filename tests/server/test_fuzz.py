"""Whatever a body says, the server answers it or refuses it in OpenAI's form: it never breaks."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.serving import Served

QUICK = settings(
    max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
ANY = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just("tiny"),
    "n": st.integers(1, 3),
    "temperature": st.floats(0, 3),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 300),
    "seed": st.integers(0, 1 << 40),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1), max_size=3),
    "stream": st.booleans(),
    "user": st.text(max_size=5),
    "priority": st.integers(-3, 3),
    "cache_salt": st.text(min_size=1, max_size=5),
}
PROMPT = st.text(min_size=1, max_size=40) | st.lists(st.integers(0, 256), min_size=1, max_size=9)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "forbidden"]), "content": st.text(max_size=30)}
    ),
    min_size=1,
    max_size=3,
)
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


def bodies(asked: str, strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Good bodies in which some fields may be anything."""
    good = st.fixed_dictionaries({asked: strategy, "max_tokens": st.integers(1, 6)}, optional=GOOD)
    names = st.sampled_from(
        [asked, "max_tokens", "tools", "logprobs", "stream_options", "echo", *GOOD]
    )
    odd = st.dictionaries(names | st.text(max_size=6), ANY, max_size=2)
    return st.builds(lambda a, b: {**a, **b}, good, odd)


def check(answer: httpx.Response) -> None:
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code == 200:
        return
    assert answer.json().keys() == {"error"}
    assert answer.json()["error"]["message"]
    assert "Traceback" not in answer.text


@QUICK
@given(bodies("messages", MESSAGES))
def test_any_chat(http: httpx.Client, body: dict[str, Any]) -> None:
    check(http.post(CHAT, json=body))


@QUICK
@given(bodies("prompt", PROMPT))
def test_any_completion(http: httpx.Client, body: dict[str, Any]) -> None:
    check(http.post(COMPLETE, json=body))


@QUICK
@given(st.binary(max_size=60) | ANY.map(lambda value: repr(value).encode()))
def test_any_bytes(http: httpx.Client, body: bytes) -> None:
    check(http.post(COMPLETE, content=body))


def test_good_bodies_are_answered(http: httpx.Client) -> None:
    """The fuzz above is worth something: most of what it calls good is answered."""

    @settings(QUICK, max_examples=15)
    @given(st.fixed_dictionaries({"prompt": PROMPT, "max_tokens": st.just(2)}, optional=GOOD))
    def run(body: dict[str, Any]) -> None:
        answer = http.post(COMPLETE, json=body)
        assert answer.status_code == 200, answer.text

    run()


def test_the_engine_is_as_before(served: Served) -> None:
    assert httpx.get(served.url + "/health").status_code == 200
    load = served.engine.load()
    assert load.running == load.waiting == 0
