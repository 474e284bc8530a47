"""Every format the loader knows, read right."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from sagellm_ir.nodes import Location
from sagellm_ir.request import (
    ChatPrompt,
    Message,
    Request,
    Sampling,
    TextPrompt,
    TokenPrompt,
    TracePrompt,
)
from sagellm_ir.requests import Loaded, load_requests


def load(*records: Any, **options: Any) -> Loaded:
    """Loads JSON records, one a line."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    return load_requests([io.StringIO(text)], **options)


def one(record: Any) -> Request:
    """The only request of a record that gives no warnings."""
    loaded = load(record)
    assert loaded.warnings == ()
    (request,) = loaded.requests
    return request


def test_chat_body() -> None:
    request = one(
        {
            "id": "q",
            "model": "any",
            "messages": [
                {"role": "system", "content": "S"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
            ],
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "seed": 3,
            "stop": "END",
            "stream": True,
            "presence_penalty": 0,
            "tools": [],
        }
    )
    assert request.prompt == ChatPrompt((Message("system", "S"), Message("user", "ab")))
    assert request.max_new_tokens == 7
    assert request.sampling == Sampling(0.5, 0.9, 40, 3, ("END",))


def test_defaults() -> None:
    request = one({"prompt": "x"})
    assert request == Request("r0", prompt=TextPrompt("x"), max_new_tokens=128)
    assert load({"prompt": "x"}, default_max_new=9).requests[0].max_new_tokens == 9


def test_scheduling_fields() -> None:
    fields: dict[str, Any] = {
        "priority": -3,
        "deadline": 4.5,
        "arrival": 1,
        "adapter": "lora-a",
        "tenant": "t",
        "session": "s",
    }
    request = one({"prompt": "x", **fields})
    assert {name: getattr(request, name) for name in fields} == fields


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_new_tokens"])
def test_aliases_of_the_answer_length(name: str) -> None:
    assert one({"prompt": "x", name: 5}).max_new_tokens == 5


def test_aliases_may_agree_and_null_is_absent() -> None:
    record = {"prompt": "x", "max_tokens": 5, "max_new_tokens": 5, "seed": None, "stop": None}
    assert one(record).max_new_tokens == 5


@pytest.mark.parametrize("name", ["tokens", "prompt_token_ids", "token_ids", "input_ids", "prompt"])
def test_token_ids(name: str) -> None:
    assert one({name: [3, 1, 2]}).prompt == TokenPrompt((3, 1, 2))


def test_bare_values() -> None:
    loaded = load("text", [1, 2], ["a", [3, 4], {"prompt": "b"}])
    assert [request.prompt for request in loaded.requests] == [
        TextPrompt("text"),
        TokenPrompt((1, 2)),
        TextPrompt("a"),
        TokenPrompt((3, 4)),
        TextPrompt("b"),
    ]


def test_all_tokens_kept_by_top_k() -> None:
    assert one({"prompt": "x", "top_k": -1}).sampling.top_k == 0


def test_several_prompts_and_answers_are_numbered_as_choices_are() -> None:
    loaded = load({"id": "q", "prompt": ["a", [7]], "n": 2, "seed": 10}, {"prompt": "z"})
    assert [(r.id, r.prompt, r.sampling.seed) for r in loaded.requests] == [
        ("q", TextPrompt("a"), 10),
        ("q#1", TextPrompt("a"), 11),
        ("q#2", TokenPrompt((7,)), 12),
        ("q#3", TokenPrompt((7,)), 13),
        ("r1", TextPrompt("z"), None),
    ]


def test_batch_lines() -> None:
    line = {
        "custom_id": "c1",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "x", "max_tokens": 4},
        "priority": 2,
    }
    request = one(line)
    assert (request.id, request.max_new_tokens, request.priority) == ("c1", 4, 2)


def test_mooncake_lines() -> None:
    loaded = load(
        {"timestamp": 27_500, "input_length": 1030, "output_length": 9, "hash_ids": [0, 1, 2]},
        {"timestamp": 27_000, "input_length": 1024, "output_length": 0, "hash_ids": [0, 1]},
    )
    first, second = loaded.requests
    assert first.prompt == TracePrompt((0, 1, 2), 1030, 512)
    assert (first.id, first.arrival, first.max_new_tokens) == ("r0", 0.5, 9)
    assert (second.id, second.arrival, second.max_new_tokens) == ("r1", 0.0, 1)


def test_the_id_of_a_block_that_is_not_full_may_be_left_out() -> None:
    record = {"input_length": 70, "hash_ids": [4], "block_size": 64}
    assert one(record).prompt == TracePrompt((4,), 70, 64)


def test_block_ids_of_two_sources_are_unrelated() -> None:
    line = json.dumps({"input_length": 1024, "hash_ids": [5, 6]})
    loaded = load_requests([io.StringIO(line), io.StringIO(line)])
    first, second = (set(r.prompt.blocks) for r in loaded.requests)  # type: ignore[union-attr]
    assert first == {5, 6}
    assert not first & second


def test_agent_sessions() -> None:
    loaded = load(
        {"timestamp": 2_000_000, "input": "b", "output": "B", "session_id": "s"},
        {"timestamp": 1_250_000, "input": "a", "output": "A", "session_id": "s"},
    )
    assert [(r.arrival, r.session, r.recorded_output) for r in loaded.requests] == [
        (0.75, "s", "B"),
        (0.0, "s", "A"),
    ]


def coding_session(**more: Any) -> dict[str, Any]:
    turn = {"type": "n", "model": "m", "out": 5}
    return {
        "id": "trace_1",
        "block_size": 64,
        "requests": [
            {**turn, "t": 0.0, "in": 130, "hash_ids": [1, 2]},
            {
                "t": 10.0,
                "type": "subagent",
                "agent_id": "agent_001",
                "requests": [{**turn, "t": 1.5, "in": 64, "hash_ids": [9]}],
            },
            {**turn, "t": 20.0, "in": 200, "hash_ids": [1, 2, 3], "out": 0},
        ],
        **more,
    }


def test_coding_agent_sessions_with_sub_agents() -> None:
    loaded = load(coding_session(tenant="t"))
    assert [(r.id, r.session, r.arrival, r.max_new_tokens) for r in loaded.requests] == [
        ("trace_1.0", "trace_1", 0.0, 5),
        ("trace_1.1", "trace_1", 20.0, 1),
        ("trace_1.agent_001.0", "trace_1.agent_001", 11.5, 5),
    ]
    assert {r.tenant for r in loaded.requests} == {"t"}
    assert loaded.requests[1].prompt == TracePrompt((1, 2, 3), 200, 64)


@pytest.mark.parametrize(("scope", "shared"), [("local", False), ("global", True)])
def test_ids_local_to_a_session_are_kept_apart(scope: str, shared: bool) -> None:
    loaded = load(
        coding_session(hash_id_scope=scope), coding_session(id="trace_2", hash_id_scope=scope)
    )
    ids: dict[str, set[int]] = {"trace_1": set(), "trace_2": set()}
    for request in loaded.requests:
        assert isinstance(request.prompt, TracePrompt)
        ids[request.id[:7]].update(request.prompt.blocks)
    assert bool(ids["trace_1"] & ids["trace_2"]) is shared


def test_azure_rows() -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,0\n"
    )
    first, second = load_requests([io.StringIO(text)]).requests
    assert first.prompt == TracePrompt((), 374, 512)
    assert (first.arrival, first.max_new_tokens) == (0.0, 44)
    assert (second.arrival, second.max_new_tokens) == (4.314579, 1)


def test_an_arrival_wins_over_a_timestamp() -> None:
    loaded = load(
        {"prompt": "x", "timestamp": 100},
        {"prompt": "x", "timestamp": 103.5},
        {"prompt": "x", "timestamp": 1, "arrival": 9},
    )
    assert [request.arrival for request in loaded.requests] == [0.0, 3.5, 9.0]


def test_ids() -> None:
    loaded = load(
        {"prompt": "x"}, {"id": "r2", "prompt": "x"}, {"prompt": "x"}, {"id": 7, "prompt": "x"}
    )
    assert [request.id for request in loaded.requests] == ["r0", "r2", "r2.1", "7"]


def test_ids_do_not_move_when_a_bad_line_is_skipped() -> None:
    loaded = load({"prompt": 1}, {"prompt": "x"}, skip_bad=True)
    assert [request.id for request in loaded.requests] == ["r1"]


def test_limit_counts_requests() -> None:
    loaded = load({"prompt": "a", "n": 3}, {"prompt": "b"}, {"prompt": 1}, limit=2)
    assert [request.id for request in loaded.requests] == ["r0", "r0#1"]
    assert load({"prompt": 1}, limit=0).requests == ()


def test_locations_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "x", "prompt": "1"}\n\n{"id": "y", "prompt": "2", "n": 2}\n')
    loaded = load_requests([path])
    assert loaded.locations == {
        "x": Location(str(path), 1),
        "y": Location(str(path), 3),
        "y#1": Location(str(path), 3),
    }


@pytest.mark.parametrize(
    "extra",
    [
        {"model": "m", "user": "u", "logprobs": True},
        {"logit_bias": {}, "tools": None, "presence_penalty": 0, "tool_choice": "auto"},
        {"repetition_penalty": 1.0, "best_of": 1},
    ],
)
def test_harmless_fields_are_ignored_silently(extra: dict[str, Any]) -> None:
    assert load({"prompt": "x", **extra}).warnings == ()


@pytest.mark.parametrize(("name", "value"), [("logit_bias", {"5": 1}), ("presence_penalty", 1)])
def test_a_field_that_would_change_the_answer_is_warned_about(name: str, value: Any) -> None:
    (warning,) = load({"prompt": "x", name: value}).warnings
    assert str(warning) == f"<stream>:1:1: warning: {name} is not supported and has no effect"


def test_an_unknown_field_is_warned_about_once_a_source() -> None:
    (warning,) = load({"prompt": "x", "max_tokns": 1}, {"prompt": "x", "max_tokns": 1}).warnings
    assert warning.severity == "warning"
    assert warning.message == "unknown field 'max_tokns' has no effect"
    assert warning.help == "did you mean 'max_tokens'?"


def test_an_unsupported_field_in_the_body_of_a_batch_line() -> None:
    (warning,) = load({"custom_id": "a", "body": {"prompt": "x", "tools": [{}]}}).warnings
    assert warning.message.startswith("tools is not supported")


def test_no_requests_is_a_warning() -> None:
    (warning,) = load().warnings
    assert "no requests in" in warning.message
