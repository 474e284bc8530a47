"""What HTTP adds: ids, keys, limits, back-pressure, broken engines, the live plan, metrics."""

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from attrs import evolve
from prometheus_client.parser import text_string_to_metric_families

from sagellm_ir.lowering.plan import PlanStep
from sagellm_ir.runtime import SageLLMEngine
from sagellm_ir.runtime.backend import TokenEvent
from sagellm_ir.runtime.config import LimitsConfig, ServerConfig
from sagellm_ir.runtime.engines.embedded import EmbeddedEngine
from tests.server.conftest import Make
from tests.server.serving import Served, serving
from tests.server.tiny import load_tiny, tiny_model

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=30) as client:
        yield client


def error(answer: httpx.Response, status: int) -> dict[str, str]:
    """The error of an answer, which has the form of OpenAI's."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    found: dict[str, str] = body["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return found


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it does not happen")


def test_health_readiness_and_what_the_engine_is(http: httpx.Client, served: Served) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/ready").json() == {"status": "ready"}
    info = http.get("/info").json()
    assert info["model"] == "tiny"
    assert info["engine_id"] == served.engine.engine_id
    assert info["capability"]["supports_logprobs"] is True
    assert info["target"]["block_size"] == 4


def test_ids_are_made_checked_and_carried_back(http: httpx.Client) -> None:
    made = http.get("/health").headers
    assert len(made["X-Request-ID"]) == 24
    assert made["X-Trace-ID"] == made["X-Request-ID"]
    given = http.get("/health", headers={"X-Request-ID": "r-1", "X-Trace-ID": "t-1"}).headers
    assert (given["X-Request-ID"], given["X-Trace-ID"]) == ("r-1", "t-1")
    for bad in (b"x" * 257, b"a b", b"\xe9"):
        answer = http.get("/health", headers={b"X-Request-ID": bad})
        assert "X-Request-ID" in error(answer, 400)["message"]
        assert "X-Request-ID" not in answer.headers


def test_the_same_id_joins_a_running_request_and_repeats_an_ended_one(
    http: httpx.Client, served: Served
) -> None:
    body = {"prompt": "join me", "max_tokens": 300, "temperature": 1.0}

    def post(given: str, **more: object) -> httpx.Response:
        return http.post(COMPLETE, json=body | more, headers={"X-Request-ID": given})

    before = served.engine.load().finished
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: post("same").json(), range(4)))
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert post("same").json()["choices"] == answers[0]["choices"]
    until(lambda: served.engine.load().finished == before + 1)
    # Streamed or not is part of the body, and so is what is asked: those are other requests.
    streamed = post("same", stream=True)
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert post("same", max_tokens=5, temperature=0).json()["usage"]["completion_tokens"] == 5
    assert post("other").json()["choices"] != answers[0]["choices"]
    assert served.engine.load().finished == before + 4


def test_a_joined_request_outlives_the_client_that_began_it(served: Served) -> None:
    body = {"prompt": "outlive", "max_tokens": 800}
    headers = {"X-Request-ID": "outlive"}

    async def main() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:

            async def post() -> httpx.Response:
                return await client.post(COMPLETE, json=body, headers=headers)

            before = served.engine.load()
            first = asyncio.create_task(post())
            while not served.engine.load().running:
                await asyncio.sleep(0.005)
            second = asyncio.create_task(post())
            await asyncio.sleep(0.05)
            first.cancel()
            assert (await second).json()["usage"]["completion_tokens"] == 800
            after = served.engine.load()
            assert after.finished == before.finished + 1
            assert after.aborted == before.aborted

    asyncio.run(main())


def test_a_request_that_its_only_client_left_runs_again(served: Served) -> None:
    body = {"prompt": "again", "max_tokens": 800}
    headers = {"X-Request-ID": "again"}
    before = served.engine.load().aborted
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(served.url + COMPLETE, json=body, headers=headers, timeout=0.1)
    until(lambda: served.engine.load().aborted == before + 1)
    answer = httpx.post(served.url + COMPLETE, json=body, headers=headers, timeout=30)
    assert answer.json()["usage"]["completion_tokens"] == 800


def test_keys_are_asked_for_and_keep_tenants_apart(make: Make) -> None:
    keys = ("secret-one", "secret-two")
    prompt = "a document that both of them read, word for word. " * 3
    with serving(make(256), ServerConfig(api_keys=keys)) as served:

        def cached(key: str, **more: str) -> int:
            answer = httpx.post(
                served.url + COMPLETE,
                json={"prompt": prompt, "max_tokens": 1, **more},
                headers={"Authorization": f"Bearer {key}"},
            )
            found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return found

        assert [cached("secret-one"), cached("secret-two")] == [0, 0]
        assert min(cached("secret-one"), cached("secret-two")) > 100
        assert cached("secret-one", cache_salt="s") == 0
        assert cached("secret-one", cache_salt="s") > 100
        assert cached("secret-two", cache_salt="s") == 0
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic secret-one"},
        ):
            for path in ("/v1/models", "/plan", "/info"):
                answer = httpx.get(served.url + path, headers=headers)
                assert error(answer, 401)["code"] == "invalid_api_key"
        for path in ("/health", "/ready", "/metrics"):
            assert httpx.get(served.url + path).status_code == 200


def test_without_keys_a_salt_keeps_users_apart(http: httpx.Client) -> None:
    prompt = "another document, long enough to be worth a few blocks of the cache"

    def cached(salt: str) -> int:
        body = {"prompt": prompt, "max_tokens": 1, "cache_salt": salt}
        usage = http.post(COMPLETE, json=body).json()["usage"]
        found: int = usage["prompt_tokens_details"]["cached_tokens"]
        return found

    assert [cached("a"), cached("b")] == [0, 0]
    assert min(cached("a"), cached("b")) > 50


def test_the_plan_is_shown_without_prompts_or_other_tenants_names(make: Make) -> None:
    with serving(make(512), ServerConfig(api_keys=("one", "two"))) as served:

        def get(key: str) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"}
            return httpx.get(served.url + "/plan", headers=headers)

        assert get("one").json() is None

        def post(key: str) -> None:
            httpx.post(
                served.url + COMPLETE,
                json={"prompt": "classified", "max_tokens": 400},
                headers={"Authorization": f"Bearer {key}", "X-Request-ID": f"of-{key}"},
                timeout=30,
            )

        threads = [threading.Thread(target=post, args=(key,)) for key in ("one", "two")]
        for thread in threads:
            thread.start()
        until(lambda: len(served.engine.decoding) == 2)
        shown = get("one")
        for thread in threads:
            thread.join()
        decoding = [name.partition("/")[0] for name in shown.json()["decoding"]]
        assert len(decoding) == 2
        assert "of-one" in decoding
        assert not {"other0", "other1"}.isdisjoint(decoding)
        assert "of-two" not in shown.text
        assert "tokens" not in shown.json()["requests"][0]
        assert shown.json()["steps"]


def test_bodies_and_prompts_have_limits(make: Make) -> None:
    limits = LimitsConfig(body_bytes=2000, prompt_tokens=50, new_tokens=20)
    with serving(make(), limits=limits) as served, httpx.Client(base_url=served.url) as http:
        assert error(http.post(COMPLETE, content=b"x" * 2001), 413)["code"] == "body_too_large"

        def pieces() -> Iterator[bytes]:
            for _ in range(30):
                yield b" " * 100

        assert error(http.post(COMPLETE, content=pieces()), 413)["code"] == "body_too_large"
        long = http.post(COMPLETE, json={"prompt": "x" * 51})
        assert error(long, 400)["code"] == "context_length_exceeded"
        much = http.post(COMPLETE, json={"prompt": "x", "max_tokens": 21})
        assert error(much, 400)["param"] == "max_tokens"
        fits = http.post(CHAT, json={"messages": [{"role": "user", "content": "x"}]})
        assert fits.json()["usage"]["completion_tokens"] == 20


def test_too_many_are_told_when_to_come_back(make: Make) -> None:
    with serving(make(blocks=16, max_waiting=2)) as served:

        def post(number: int) -> httpx.Response:
            body = {"prompt": f"{number:20}", "max_tokens": 44}
            return httpx.post(served.url + COMPLETE, json=body, timeout=60)

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(post, range(12)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 0 < len(refused) < 12
        for answer in refused:
            assert error(answer, 429)["code"] == "engine_busy"
            assert 1 <= int(answer.headers["Retry-After"]) <= 30


class Breaking(EmbeddedEngine):
    """An engine whose device gives up after some steps."""

    def step(self, step: PlanStep) -> list[TokenEvent]:
        if self.stats().steps >= 6:
            raise RuntimeError("secret detail of a device")
        return super().step(step)


def test_a_broken_engine_cuts_streams_and_is_unhealthy() -> None:
    loaded = load_tiny()
    engine = SageLLMEngine(evolve(loaded, backend=Breaking(tiny_model(), loaded.target)))
    engine.start()
    body = {"prompt": "x", "max_tokens": 100}
    with serving(engine) as served, httpx.Client(base_url=served.url, timeout=30) as http:
        lines: list[str] = []
        with http.stream("POST", COMPLETE, json=body | {"stream": True}) as answer:
            assert answer.status_code == 200
            with pytest.raises(httpx.RemoteProtocolError):
                lines.extend(answer.iter_lines())
        last = json.loads([line for line in lines if line][-1].removeprefix("data: "))
        assert last["error"]["code"] == "engine_failed"
        assert "data: [DONE]" not in lines
        assert error(http.post(COMPLETE, json=body), 500)["code"] == "engine_failed"
        assert "secret" not in http.post(COMPLETE, json=body).text
        assert error(http.get("/health"), 503)
        assert error(http.get("/ready"), 503)
    engine.stop()


def test_metrics_count_what_happened(make: Make) -> None:
    with serving(make()) as served, httpx.Client(base_url=served.url) as http:
        for _ in range(3):
            http.post(COMPLETE, json={"prompt": "twelve bytes", "max_tokens": 4})
        http.post(COMPLETE, json={"prompt": ""})
        text = http.get("/metrics").text
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["sagellm_finished_total",] == 3
    assert found["sagellm_prompt_tokens_total",] == 36
    assert found["sagellm_cached_tokens_total",] == 2 * 8
    assert found["sagellm_generated_tokens_total",] == 12
    assert found["sagellm_ttft_seconds_count",] == 3
    assert found["sagellm_tpot_seconds_count",] == 3
    assert found["sagellm_http_answers_total", "200"] == 3
    assert found["sagellm_http_answers_total", "400"] == 1
    assert found["sagellm_kv_capacity_blocks",] == 64


def test_wrong_paths_and_methods_have_errors_of_the_same_form(http: httpx.Client) -> None:
    assert "did you mean '/v1/models'?" in error(http.get("/v1/model"), 404)["message"]
    assert "/v1/chat/completions, " in error(http.get("/"), 404)["message"]
    assert error(http.get(CHAT), 405)["message"] == "/v1/chat/completions does not take GET"
    assert error(http.post(COMPLETE, content=b"{"), 400)["code"] == "invalid_json"
    assert error(http.post(COMPLETE, content=b"[]"), 400)["code"] == "invalid_json"
    assert error(http.post(COMPLETE, content=b"\xff\xfe"), 400)["code"] == "invalid_json"
    deep = b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert error(http.post(COMPLETE, content=deep), 400)["code"] == "invalid_json"
    huge = b'{"prompt":"x","seed":' + b"9" * 5000 + b"}"
    assert error(http.post(COMPLETE, content=huge), 400)


def test_clients_that_come_and_go_leave_nothing(make: Make) -> None:
    engine = make(64)
    rng = random.Random(17)

    async def one(client: httpx.AsyncClient, number: int) -> None:
        body = {
            "prompt": "shared " * rng.randint(1, 10) + str(number),
            "max_tokens": rng.randint(1, 60),
            "stream": rng.random() < 0.7,
            "n": rng.choice([1, 1, 2]),
        }

        async def read() -> None:
            async with client.stream("POST", COMPLETE, json=body) as answer:
                async for _ in answer.aiter_bytes():
                    if rng.random() < 0.05:
                        return

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), rng.choice([0.02, 0.1, 30]))

    async def main(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            for _ in range(5):
                await asyncio.gather(*(one(client, number) for number in range(24)))

    before = {thread.name for thread in threading.enumerate()}
    with serving(engine) as served:
        asyncio.run(main(served.url))
        until(lambda: engine.load().running == engine.load().waiting == 0)
        load = engine.load()
        assert load.aborted > 0
        assert load.finished > 0
        assert not load.failed
        assert load.kv_used_blocks == 0
        # All of the pool can be had again: nothing has leaked.
        answer = httpx.post(
            served.url + COMPLETE, json={"prompt": "x" * 236, "max_tokens": 20}, timeout=30
        )
        assert answer.status_code == 200
    assert {thread.name for thread in threading.enumerate()} == before
