"""`UnifiedInferenceClient`: by way of a gateway, and inside the process of a Control Plane."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.control_plane.client import UnifiedInferenceClient
from tests.control_plane.gateways import (
    BOTH,
    NEW,
    QUESTION,
    attached,
    engine,
    run,
    sage,
)
from tests.control_plane.tiny_fleet import MODEL, ask, chat, expected, tiny_engine


@BOTH
def test_the_unified_client(gateway: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def use() -> None:
        with UnifiedInferenceClient.create() as client:
            assert client.models() == [MODEL]
            assert [engine["engine_id"] for engine in client.engines()] == ["a"]
            messages = [{"role": "user", "content": QUESTION}]
            answer = client.chat(messages, max_tokens=NEW, temperature=0)
            assert answer["choices"][0]["message"]["content"] == expected(chat("x", QUESTION))
            answer = client.generate(QUESTION, max_tokens=NEW, temperature=0)
            assert answer["choices"][0]["text"] == expected(ask("x", QUESTION))
            pieces = list(client.stream(QUESTION, max_tokens=NEW, temperature=0))
            assert len(pieces) > 1
            assert "".join(pieces) == expected(chat("x", QUESTION))
            with pytest.raises(SageIRError, match=r"answered [45]"):
                client.chat(messages, model="no-such-model")

    async def test() -> None:
        async with gateway() as at, engine("a") as (_, port), attached(at, "a", port):
            monkeypatch.setenv("SAGELLM_GATEWAY_URL", at.url)
            await asyncio.to_thread(use)

    run(test)


def test_the_unified_client_in_process() -> None:
    async def test() -> None:
        async with sage() as at:
            from sagellm_ir.runtime.control_plane.in_process import register

            made = tiny_engine("a")
            made.start()
            registration = await register(at.fleet, made)
            client = UnifiedInferenceClient.create(control_plane=at.fleet)

            def use() -> None:
                assert client.models() == [MODEL]
                answer = client.generate(QUESTION, max_tokens=NEW, temperature=0)
                assert answer["choices"][0]["text"] == expected(ask("x", QUESTION))
                assert answer["usage"]["completion_tokens"] == NEW
                pieces = client.stream(QUESTION, max_tokens=NEW, temperature=0)
                assert "".join(pieces) == expected(chat("x", QUESTION))
                with pytest.raises(SageIRError, match="no-such-model"):
                    client.generate("x", model="no-such-model")

            await asyncio.to_thread(use)
            # Over HTTP, the gateway package answers from the same engine: create_app(control_plane=...).
            body: dict[str, Any] = {"model": MODEL, "max_tokens": NEW, "temperature": 0}
            body["messages"] = [{"role": "user", "content": QUESTION}]
            reply = (await at.http.post("/v1/chat/completions", json=body)).json()
            assert reply["choices"][0]["message"]["content"] == expected(chat("x", QUESTION))
            assert made.load().finished == 3
            await registration.close()
            made.stop()

    run(test)


def test_no_gateway_is_an_error_that_helps() -> None:
    with (
        UnifiedInferenceClient.create("http://127.0.0.1:9") as client,
        pytest.raises(SageIRError, match="gateway start"),
    ):
        client.chat([{"role": "user", "content": "x"}])
