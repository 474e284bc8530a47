"""Whatever is fed to the loader, it loads or says why: no other exception."""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from sagellm_ir.build import ByteTokenizer, build
from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.requests import load_requests
from sagellm_ir.requests.known import OWN, UNSUPPORTED
from sagellm_ir.target import Target

# No deadline: a busy machine is not a bug.
QUICK = settings(deadline=None, max_examples=50)
NAMES = sorted(
    {*OWN, *UNSUPPORTED, "body", "requests", "ContextTokens", "GeneratedTokens", "TIMESTAMP"}
    | {"in", "out", "t", "role", "content", "type", "text", "agent_id", "url", "method", "other"}
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 512, 10**30])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "text", "x", "5"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6)
    ),
    max_leaves=12,
)


@QUICK
@given(st.lists(VALUES, max_size=4))
def test_any_json(values: list[Any]) -> None:
    text = "\n".join(map(json.dumps, values))
    with contextlib.suppress(SageIRError):
        load_requests([io.StringIO(text)])
    loaded = load_requests([io.StringIO(text)], skip_bad=True)
    with contextlib.suppress(SageIRError):
        graph = build(loaded.requests, Target(), tokenizer=ByteTokenizer()).graph
        assert [decl.id for decl in graph.requests] == [r.id for r in loaded.requests]


@QUICK
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8))
def test_any_record(record: dict[str, Any]) -> None:
    loaded = load_requests([io.StringIO(json.dumps(record))], skip_bad=True)
    assert loaded.requests or loaded.skipped or "requests" in record


@QUICK
@given(st.binary(max_size=60), st.sampled_from(["r.jsonl", "r.json", "r.csv", "r", "r.jsonl.gz"]))
@example(b"\x00\x00\x00\x80", "r.jsonl")  # looks like UTF-32 to json
def test_any_bytes(data: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(SageIRError):
        path = Path(folder) / name
        path.write_bytes(data)
        load_requests([path])


@QUICK
@given(st.text('[]{}",:1 \nap', max_size=20))
def test_any_near_json(text: str) -> None:
    with contextlib.suppress(SageIRError):
        load_requests([io.StringIO(text)])
