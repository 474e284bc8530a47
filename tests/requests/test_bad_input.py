"""One test a message: what a bad record says."""

import io
import json
from typing import Any

import pytest

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.requests import load_requests

CHAT = [{"role": "user", "content": "x"}]
TURN = {"t": 0, "in": 64, "out": 1, "hash_ids": [1]}
DEEP: dict[str, Any] = {"requests": []}
for _ in range(20):
    DEEP = {"requests": [DEEP]}

BAD: list[tuple[Any, str]] = [
    (3, "record: expected an object, a text or a list of ids, got 3"),
    ({}, "prompt: expected one of messages, prompt, tokens"),
    ({"mesages": CHAT}, "help: is 'mesages' misspelt?"),
    ({"prompt": "x", "messages": CHAT}, "prompt: there is a prompt already, in 'messages'"),
    ({"prompt": ""}, "prompt: expected a text that is not empty, got ''"),
    ({"prompt": 5}, "prompt: expected a text, a list of texts, or token ids, got 5"),
    ({"prompt": []}, "prompt: expected a text, a list of texts, or token ids, got []"),
    ({"prompt": ["a", ""]}, "prompt[1]: expected a text that is not empty, got ''"),
    ({"prompt": [[1], []]}, "prompt[1]: expected at least one token id, got []"),
    ({"prompt": "\ud800"}, "prompt: the text holds half of a surrogate pair"),
    ({"tokens": "1 2"}, "tokens: expected a list of token ids, got '1 2'"),
    ({"tokens": [1, True]}, "tokens[1]: expected a whole number from 0 to 4294967295, got True"),
    ({"tokens": [1, -4]}, "tokens[1]: expected a whole number from 0 to 4294967295, got -4"),
    ({"tokens": [1, 2.5]}, "tokens[1]: expected a whole number from 0 to 4294967295, got 2.5"),
    ({"tokens": [1 << 32]}, "tokens[0]: expected a whole number from 0 to 4294967295"),
    ({"messages": []}, "messages: expected a list of at least one message, got []"),
    ({"messages": ["hi"]}, "messages[0]: expected a message with role and content, got 'hi'"),
    ({"messages": [{"content": "x"}]}, "messages[0].role: expected a text such as 'user'"),
    (
        {"messages": [{"role": "user"}]},
        "messages[0].content: expected a text or a list of text parts, got None",
    ),
    (
        {"messages": [*CHAT, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "messages[1].tool_calls: calls of tools are not supported",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]: expected a text part, got a part of type 'image_url'",
    ),
    (
        {"messages": [{"role": "user", "content": ["x"]}]},
        "messages[0].content[0]: expected a text part, got 'x'",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text: expected a text, got None",
    ),
    ({"prompt": "x", "max_tokens": "ten"}, "max_tokens: expected a whole number of at least 1"),
    (
        {"prompt": "x", "max_tokens": 0},
        "max_tokens: expected a whole number of at least 1, got 0",
    ),
    ({"prompt": "x", "max_tokens": 1.0}, "max_tokens: expected a whole number of at least 1"),
    (
        {"prompt": "x", "max_tokens": 4, "max_new_tokens": 5},
        "max_tokens: it differs from 'max_new_tokens', which means the same",
    ),
    ({"prompt": "x", "n": 0}, "n: expected a whole number of at least 1, got 0"),
    ({"prompt": "x", "n": 10**9}, "n: expected at most 1024, got 1000000000"),
    (
        {"prompt": "x", "priority": "high"},
        "priority: expected a whole number, got 'high'",
    ),
    ({"prompt": "x", "arrival": -1}, "arrival: expected a number from 0 to 1e+18, got -1"),
    ({"prompt": "x", "deadline": True}, "deadline: expected a number from 0 to 1e+18, got True"),
    (
        {"prompt": "x", "arrival": float("inf")},
        "arrival: expected a number from 0 to 1e+18, got inf",
    ),
    (
        {"prompt": "x", "arrival": float("nan")},
        "arrival: expected a number from 0 to 1e+18, got nan",
    ),
    ({"prompt": "x", "temperature": -1}, "temperature: expected a number from 0 to 1e+18, got -1"),
    ({"prompt": "x", "top_p": 2}, "top_p: expected a number from 0 to 1, got 2"),
    ({"prompt": "x", "top_p": 0}, "top_p: expected a number above 0 and at most 1, got 0"),
    (
        {"prompt": "x", "top_k": -2},
        "top_k: expected a whole number of at least -1, got -2",
    ),
    (
        {"prompt": "x", "arrival": 10**400},
        "arrival: expected a number from 0 to 1e+18, got a larger",
    ),
    (
        {"prompt": "x", "seed": 10**18},
        "seed: expected a whole number of at most 18 digits, got a larger",
    ),
    ({"prompt": "x", "seed": "a"}, "seed: expected a whole number, got 'a'"),
    ({"prompt": "x", "stop": 5}, "stop: expected a text or a list of texts"),
    ({"prompt": "x", "stop": ["a", ""]}, "stop: expected a text or a list of texts"),
    ({"prompt": "x", "tenant": ""}, "tenant: expected a text that is not empty, got ''"),
    ({"prompt": "x", "adapter": 3}, "adapter: expected a text that is not empty, got 3"),
    ({"prompt": "x", "id": ""}, "id: expected a text of 1 to 256 characters, got ''"),
    ({"prompt": "x", "id": "a" * 257}, "id: expected a text of 1 to 256 characters"),
    ({"prompt": "x", "id": "a\nb"}, "id: expected a text of printable characters"),
    ({"prompt": "x", "id": [1]}, "id: expected a text of 1 to 256 characters, got [1]"),
    (
        {"prompt": "x", "timestamp": "now"},
        "timestamp: expected a number from 0 to 1e+18, got 'now'",
    ),
    ({"custom_id": "a", "body": "x"}, "body: expected an object, got 'x'"),
    ({"custom_id": "a", "method": "GET", "body": {}}, "method: expected 'POST', got 'GET'"),
    (
        {"custom_id": "a", "url": "/v1/embeddings", "body": {"input": "x"}},
        "url: expected '/v1/chat/completions' or '/v1/completions', got '/v1/embeddings'",
    ),
    (
        {"hash_ids": [1]},
        "input_length: expected a whole number of at least 1, got None",
    ),
    ({"hash_ids": [1], "input_length": 0}, "input_length: expected a whole number of at least 1"),
    ({"hash_ids": 5, "input_length": 9}, "hash_ids: expected a list of block ids, got 5"),
    ({"hash_ids": [-1], "input_length": 9}, "hash_ids[0]: expected a whole number from 0"),
    (
        {"hash_ids": [1, 2, 3], "input_length": 600},
        "hash_ids: expected 1 or 2 ids for 600 tokens in blocks of 512, got 3",
    ),
    (
        {"hash_ids": [1], "input_length": 1024},
        "hash_ids: expected 2 ids for 1024 tokens in blocks of 512, got 1",
    ),
    (
        {"hash_ids": [1], "input_length": 9, "output_length": -1},
        "output_length: expected a whole number of at least 0, got -1",
    ),
    ({"input": None}, "input: expected a text that is not empty, got None"),
    ({"input": "x", "output": 5}, "output: expected a text, got 5"),
    ({"requests": 5}, "requests: expected a list of turns, got 5"),
    ({"requests": [5]}, "requests[0]: expected an object, got 5"),
    ({"requests": [TURN, {**TURN, "in": "x"}]}, "requests[1].in: expected a whole number"),
    (
        {"requests": [{"t": 1, "requests": [{**TURN, "t": -1}]}]},
        "requests[0].requests[0].t: expected a number from 0 to 1e+18, got -1",
    ),
    (DEEP, "requests: sub-agents are nested more than 16 deep"),
    (
        {"TIMESTAMP": "2023-11-16 18:15:46", "ContextTokens": "x", "GeneratedTokens": "1"},
        "ContextTokens: expected a whole number of at least 1, got 'x'",
    ),
    (
        {"ContextTokens": "5", "GeneratedTokens": "5"},
        "TIMESTAMP: expected a date and time, got None",
    ),
]


@pytest.mark.parametrize(("record", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_a_bad_record_says_what_and_where(record: Any, message: str) -> None:
    text = "\n".join(map(json.dumps, [{"id": "good", "prompt": "x"}, record]))
    with pytest.raises(SageIRError) as caught:
        load_requests([io.StringIO(text)])
    assert message in str(caught.value)
    assert str(caught.value).startswith("<stream>:2:1: error: ")
    loaded = load_requests([io.StringIO(text)], skip_bad=True)
    assert [request.id for request in loaded.requests] == ["good"]
    assert message in str(loaded.skipped[0])


def test_all_bad_records_are_told_at_once_up_to_20() -> None:
    with pytest.raises(SageIRError) as caught:
        load_requests([io.StringIO('{"prompt": 1}\n' * 3)])
    assert [d.loc.line for d in caught.value.diagnostics if d.loc] == [1, 2, 3]
    with pytest.raises(SageIRError) as caught:
        load_requests([io.StringIO('{"prompt": 1}\n' * 50)])
    *shown, last = caught.value.diagnostics
    assert len(shown) == 20
    assert str(last) == (
        "error: stopped reading after 20 errors\nhelp: --skip-bad counts bad records and goes on"
    )


def test_an_id_used_twice_names_both_places() -> None:
    text = '{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n'
    with pytest.raises(SageIRError) as caught:
        load_requests([io.StringIO(text)])
    (found,) = caught.value.diagnostics
    assert str(found) == (
        "<stream>:3:1: error: id: 'a' is taken\n"
        "note: first used at <stream>:1:1\n"
        "help: give each request its own id"
    )
    loaded = load_requests([io.StringIO(text)], skip_bad=True)
    assert [(r.id, r.prompt) for r in loaded.requests] == [
        (r.id, r.prompt) for r in load_requests([io.StringIO(text)], limit=2).requests
    ]
    assert len(loaded.skipped) == 1


def test_a_copy_collides_with_an_id_of_the_same_name() -> None:
    text = '{"id": "a#1", "prompt": "x"}\n{"id": "a", "prompt": "x", "n": 2}\n'
    with pytest.raises(SageIRError, match="'a#1' is taken"):
        load_requests([io.StringIO(text)])
