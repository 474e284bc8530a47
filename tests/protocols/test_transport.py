"""KV goes from one engine to another, and the answer is that of one engine alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.engines.embedded.pool import KVPool
from sagellm_ir.runtime.kv_runtime.transport import CommTransport, LocalExchange
from sagellm_ir.runtime.protocols import (
    CommBackendProtocol,
    KVBackendProtocol,
    KVCacheSchema,
    KVChunk,
    KVSchemaConfig,
    TransportEngine,
)
from sagellm_ir.runtime.protocols.serial import from_json, to_json
from tests.embedded.tiny import TINY, oracle, prompt, request
from tests.protocols.moving import MODEL, NEW, PROMPT, THERE, engine_of, finish, start

NATIVE = KVSchemaConfig()
ROOT = Path(__file__).parents[2]


def alone(schema: KVSchemaConfig) -> list[int]:
    """The answer of one engine that moves nothing."""
    engine = engine_of(schema)
    chunk = start(engine)
    return finish(engine, chunk)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8_e4m3", "int8"])
def test_two_engines_of_one_process(dtype: str) -> None:
    schema = KVSchemaConfig(dtype=dtype)
    exchange = LocalExchange(("prefill", "decode"), timeout=5)
    sender, receiver = exchange.end("prefill"), exchange.end("decode")
    assert isinstance(sender, TransportEngine)
    sender.send(start(engine_of(schema)), "decode")
    chunk = receiver.receive("prefill")
    answer = finish(engine_of(schema), KVChunk.from_bytes(chunk.to_bytes()))
    assert answer == alone(schema)
    if dtype == "fp32":
        assert answer == oracle(MODEL, PROMPT, NEW)


def test_two_processes_over_gloo(tmp_path: Path) -> None:
    dtype = "int8"
    words = [sys.executable, "-m", "tests.protocols.two_ranks"]
    ranks = [
        subprocess.Popen(
            [*words, str(rank), str(tmp_path / "meeting"), dtype],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    first, second = map(json.loads, outs)
    assert (first["right"], second["right"]) == ([True] * 5, [True] * 3)
    assert second["answer"] == alone(KVSchemaConfig(dtype=dtype))


def test_damaged_kv_shows() -> None:
    """Negative control: the tokens do depend on what was moved."""
    chunk = start(engine_of(NATIVE))
    wrong = evolve(chunk, data=bytes(len(chunk.data)))
    assert finish(engine_of(NATIVE), wrong) != oracle(MODEL, PROMPT, NEW)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"prompt": prompt(37, 2)}, "not that of its first 36 tokens"),
        ({"prompt": (*PROMPT[:35], 1, 1)}, "not that of its first 36 tokens"),
        ({"prompt": PROMPT[:20]}, "not that of its first 36 tokens"),
        ({"tenant": "other"}, "adapter or tenant"),
        ({"schema": KVSchemaConfig("int8")}, "stored in another way"),
        ({"blocks": THERE[:3]}, "bytes are not 3 KV blocks"),
        ({"blocks": (*THERE[:8], 99)}, "block 99"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], word: str) -> None:
    schema, blocks = change.get("schema", NATIVE), change.get("blocks", THERE[:9])
    assert isinstance(schema, KVSchemaConfig)
    assert isinstance(blocks, tuple)
    chunk, engine = start(engine_of(NATIVE)), engine_of(schema)
    tokens = change.get("prompt", PROMPT)
    assert isinstance(tokens, tuple)
    tenant = change.get("tenant")
    assert tenant is None or isinstance(tenant, str)
    engine.submit(evolve(request("mine", tokens, NEW), tenant=tenant))
    with pytest.raises(SageIRError, match=word):
        engine.import_kv(chunk, "mine", "w0", blocks)


def test_nothing_computed_is_nothing_to_move() -> None:
    engine = engine_of(NATIVE)
    engine.submit(request("r", PROMPT, NEW))
    with pytest.raises(SageIRError, match="holds no KV of request 'r'"):
        engine.export_kv("r", "w0")


CHUNK = KVChunk("r", KVCacheSchema(1, 1, 2, 2, "int8", "token_head"), 3, ("aa", "bb"), bytes(48))


def test_a_chunk_comes_back() -> None:
    assert KVChunk.from_bytes(CHUNK.to_bytes()) == CHUNK
    assert from_json(KVChunk, to_json(CHUNK)) == CHUNK


@given(at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_chunk_is_refused_or_the_same(at: int, byte: int, cut: bool) -> None:
    wire = bytearray(CHUNK.to_bytes())
    at %= len(wire)
    if cut:
        del wire[at:]
    else:
        wire[at] = byte
    try:
        found = KVChunk.from_bytes(bytes(wire))
    except SageIRError:
        return
    # A byte of the header's text may be another valid text; the data never changes.
    assert found.data == CHUNK.data


@pytest.mark.parametrize(
    "change", [{"data": bytes(47)}, {"identities": ("aa",)}, {"tokens": 0}, {"tokens": 5}]
)
def test_impossible_chunks(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"data|identities|tokens"):
        evolve(CHUNK, **change)  # type: ignore[arg-type]


def test_ends_are_known_and_do_not_wait_forever() -> None:
    exchange = LocalExchange(("a", "b"), timeout=0.01)
    with pytest.raises(SageIRError, match="called 'c'"):
        exchange.end("c")
    with pytest.raises(SageIRError, match="no KV chunk came from 'b'"):
        exchange.end("a").receive("b")
    for _ in range(8):
        exchange.end("a").send(CHUNK, "b")
    with pytest.raises(SageIRError, match="took no KV chunk"):
        exchange.end("a").send(CHUNK, "b")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8_e5m2", "int8"])
def test_a_pool_is_a_kv_backend(dtype: str) -> None:
    schema = KVCacheSchema.of(TINY.spec(4), 4, dtype)
    pool: KVBackendProtocol = KVPool(schema, {"device": 6, "host": 4}, torch.float32, torch.device("cpu"))  # fmt: skip
    assert isinstance(pool, KVBackendProtocol)
    data = torch.randint(256, (2 * schema.block_bytes,), dtype=torch.uint8).numpy().tobytes()
    pool.write("device", (4, 1), data)
    assert pool.read("device", (4, 1)) == data
    pool.copy_within("device", (1, 4), "host", (2, 0))
    half = schema.block_bytes
    assert pool.read("host", (0, 2)) == data
    assert pool.read("host", (2,)) == data[half:]


class Pair:
    """A group of two without a network, for names only."""

    rank, size = 0, 2


def test_ranks_are_checked() -> None:
    transport = CommTransport(Pair())  # type: ignore[arg-type]
    for name in ("0", "2", "x"):
        with pytest.raises(SageIRError, match="no other rank is called"):
            transport.receive(name)
    assert not isinstance(Pair(), CommBackendProtocol)
