"""KV stored in another type: what codes mean, what they cost, and that plans still do not matter."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.plan import Bind, KVFree, KVMove, PlanStep, PrefillChunk, PrefixGroup
from sagellm_ir.runtime.engines import load_backend
from sagellm_ir.runtime.engines.embedded import CausalLM, EmbeddedEngine, attention, random_model
from sagellm_ir.runtime.engines.embedded.calibrate import forward_all
from sagellm_ir.runtime.engines.embedded.pages import CodedPages, NativePages
from sagellm_ir.runtime.engines.embedded.pool import KVPool
from sagellm_ir.runtime.kv_runtime.codec import CODECS
from sagellm_ir.runtime.protocols import KVCacheSchema, KVSchemaConfig, QuantizationProfile
from sagellm_ir.target import Target
from tests.embedded.tiny import (
    BLOCK,
    SEED,
    TINY,
    answers,
    blocks_of,
    decode,
    prefill,
    prompt,
    request,
    run,
)

DTYPES = ["bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "int8"]
BITS = {"fp8_e4m3": 3, "fp8_e5m2": 2}
"""Of the mantissa."""
FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
A, B = prompt(37, 1), prompt(29, 2)
DOC = prompt(24, 5)
NEW = 9


def values(seed: int, scale: float) -> torch.Tensor:
    """Random (2, kv_heads, tokens, head_dim) with outliers, a token of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(2, 3, 5, 16, generator=generator) * scale
    made[0, 1] *= 40
    made[1, 2, 3] = 0
    return made


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "int8"])
@given(seed=st.integers(0, 999), scale=st.floats(1e-6, 1e6))
def test_the_error_of_an_element_is_bounded(name: str, seed: int, scale: float) -> None:
    codec = CODECS[name]
    given_ = values(seed, scale)
    scales = codec.scales(given_)
    codes = codec.encode(given_, scales)
    assert scales.shape == (2, 3, 5, 1)
    error = (codec.decode(codes, scales, torch.float32) - given_).abs()
    # Half a step: of the grid for int8; for floats, of the mantissa or of the subnormal grid.
    bound = scales * 0.5
    if name != "int8":
        subnormal = torch.finfo(FLOAT8[name]).smallest_normal * 2.0 ** -BITS[name]
        bound = torch.maximum(given_.abs() * 2.0 ** -(BITS[name] + 1), scales * subnormal / 2)
    assert (error <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", list(FLOAT8))
def test_every_byte_decodes_as_torch_does(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    expected = codes.view(FLOAT8[name]).float()
    scales = torch.full((256, 1), 0.75)
    found = CODECS[name].decode(codes, scales, torch.float32)
    finite = expected.isfinite()
    assert finite.sum() >= 248
    assert torch.equal(found[finite], expected[finite] * 0.75)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_give_back_what_they_said_they_stored(dtype: str) -> None:
    schema = KVCacheSchema(1, 2, 16, BLOCK, dtype, "token_head" if CODECS[dtype].scaled else "none")
    pool = KVPool(schema, {"device": 8}, torch.float32, torch.device("cpu"))
    pages = pool.layers[0]
    assert isinstance(pages, CodedPages)
    key, value = torch.randn(2, 6, 2, 16)
    slots = torch.tensor([9, 3, 4, 5, 31, 0])
    stored = torch.stack(pages.write(slots, key, value))
    taken = pages.take(slots[None])[:, 0].transpose(1, 2)
    assert torch.equal(taken, stored)
    assert torch.equal(pages.spans(3, 0, 1, 3)[:, 0].transpose(1, 2), stored[:, 1:4])
    assert not torch.equal(stored[0], key)


@pytest.mark.parametrize("dtype", ["fp32", *DTYPES])
def test_a_pool_takes_what_its_schema_says(dtype: str) -> None:
    schema = KVCacheSchema.of(TINY.spec(4), BLOCK, dtype)
    pool = KVPool(schema, {"device": 8, "host": 3}, torch.float32, torch.device("cpu"))
    for tier, blocks in pool.capacity.items():
        taken = sum(part.numel() * part.itemsize for part in pool._tiers[tier])
        assert taken == blocks * schema.block_bytes


def engine_of(model: CausalLM, target: Target, schema: KVSchemaConfig) -> EmbeddedEngine:
    """An engine that stores KV so."""
    spec = schema.fit(model.spec, model.dtype_name)
    return EmbeddedEngine(model, evolve(target, model=spec), kv_schema=schema)


def oracle(model: CausalLM, tokens: Sequence[int], new: int, dtype: str) -> list[int]:
    """Greedy decoding that runs all tokens again for each new one, each time storing KV so."""
    known = list(tokens)
    for _ in range(new):
        size = len(known)
        schema = KVCacheSchema.of(model.spec, 1, dtype)
        pool = KVPool(schema, {"device": size}, model.dtype, model.device)
        known.append(int(forward_all(model, pool.layers, known)[-1].argmax()))
    return known[len(tokens) :]


@pytest.fixture(params=["views", "copies"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `test_engine`: both ways to read a span, and sharing even where it does not pay."""
    if request.param == "views":
        monkeypatch.setattr(attention, "VIEW_TOKENS", 0)
        monkeypatch.setattr(attention, "SHARE_TOKENS", 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_do_not_depend_on_the_plan(model: CausalLM, target: Target, dtype: str) -> None:
    """In chunks or whole, shared or not, spilled, fetched elsewhere, moved to another worker."""
    engine = engine_of(model, target, KVSchemaConfig(dtype=dtype))
    first, second = DOC + A[:13], DOC + B[:6]
    expected = {name: oracle(model, tokens, NEW, dtype) for name, tokens in (("a", first), ("b", second))}  # fmt: skip
    doc, groups = blocks_of(len(DOC), 8), (PrefixGroup(0, len(DOC), ("a", "b")),)
    table = (*doc, 20, 22, 21, 24, 25, 26)
    elsewhere = tuple(range(40, 40 + len(table)))
    out = KVMove("device", "host", table, tuple(range(len(table))))
    back = KVMove("host", "device", tuple(range(len(table))), elsewhere)
    there = KVMove("device", "device", elsewhere, table, from_worker="w0")
    engine.submit(request("a", first, NEW))
    engine.submit(request("b", second, NEW))
    events = run(
        engine,
        prefill("a", 10, table),
        PlanStep(0, prefill=(PrefillChunk("a", 10, len(DOC)),)),
        PlanStep(
            1,
            binds=(Bind("b", 0, (*doc, 50, 33, 34, 35)),),
            prefill=(
                PrefillChunk("b", len(DOC), len(second)),
                PrefillChunk("a", len(DOC), len(first)),
            ),
            groups=groups,
        ),
        PlanStep(2, decode=("a", "b"), loops=3, groups=groups),
        PlanStep(3, kv=(out, KVFree("device", table[6:])), decode=("b",), loops=5),
        PlanStep(4, kv=(back,), binds=(Bind("a", 0, elsewhere),), decode=("a",), loops=2),
        PlanStep(5, "w1", (there,), (Bind("a", 0, table),), decode=("a",), loops=3),
    )
    assert answers(events) == expected


def test_quantisation_is_really_on(model: CausalLM, target: Target) -> None:
    """Negative control: the logits of quantised KV differ from those of native KV."""
    logits = {}
    for dtype in ("fp32", "fp8_e5m2"):
        schema = KVCacheSchema.of(model.spec, 1, dtype)
        pool = KVPool(schema, {"device": len(A)}, model.dtype, model.device)
        logits[dtype] = forward_all(model, pool.layers, A)
    assert not torch.allclose(logits["fp32"], logits["fp8_e5m2"], atol=1e-3)


def test_the_model_s_own_type_is_stored_as_it_is(target: Target) -> None:
    """`auto`, and `bf16` of a bfloat16 model, take the path without any codec."""
    for dtype, schema in (
        ("float32", KVSchemaConfig()),
        ("bfloat16", KVSchemaConfig()),
        ("bfloat16", KVSchemaConfig("bf16")),
    ):
        model = random_model(TINY, SEED, dtype)
        engine = engine_of(model, evolve(target, model=model.spec), schema)
        pool = engine._workers["w0"].pool
        assert all(isinstance(pages, NativePages) for pages in pool.layers)
        assert engine.target.model == model.spec


def test_a_target_for_native_kv_is_refused(model: CausalLM, target: Target) -> None:
    with pytest.raises(SageIRError, match=r"KV schema(.|\n)*kv_head_bytes: the target has 0"):
        EmbeddedEngine(model, target, kv_schema=KVSchemaConfig("int8"))


def test_a_pool_in_bytes_holds_more_quantised_blocks() -> None:
    tiers = {"tiers": {"device": {"bytes": 64e6}, "host": {"blocks": 0}}}
    held = {}
    for preset in ("auto", "bf16", "int8"):
        loaded = load_backend(
            "embedded", "smollm2-135m", overrides=tiers, kv_schema=KVSchemaConfig(preset)
        )
        tier = loaded.target.tier("device")
        assert tier is not None
        held[preset] = tier.blocks
    assert held == {"auto": 86, "bf16": 173, "int8": 326}


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_profile_s_scales_are_used(
    model: CausalLM, target: Target, tmp_path: Path, suffix: str
) -> None:
    rows = ((0.01, 0.02), (0.03, 0.04))
    path = tmp_path / f"p.{suffix}"
    QuantizationProfile("int8", "head", rows, rows).save(path)
    engine = engine_of(model, target, KVSchemaConfig(profile=str(path)))
    assert engine.kv_schema.block_bytes == 2 * 2 * 2 * 16 * BLOCK
    pages = engine._workers["w0"].pool.layers[1]
    key, value = torch.randn(2, 3, 2, 16)
    stored = torch.stack(pages.write(torch.tensor([7, 8, 9]), key, value))
    scale = torch.tensor(rows[1])[:, None]
    given_ = torch.stack((key, value))
    assert torch.allclose(stored, (given_ / scale).round().clamp(-127, 127) * scale)
    assert torch.equal(pages.spans(7, 0, 1, 3)[:, 0].transpose(1, 2), stored)
    engine.submit(request("a", A, 2))
    assert len(run(engine, prefill("a", len(A), blocks_of(len(A) + 2, 0)), decode("a"))) == 2


def test_scales_of_a_block_are_refused(model: CausalLM, target: Target, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    QuantizationProfile("int8", "block").save(path)
    with pytest.raises(SageIRError, match="for each token and head, not for each block"):
        EmbeddedEngine(model, target_of(model, target, path), kv_schema=profile_of(path))


def profile_of(path: Path) -> KVSchemaConfig:
    """KV as a profile's file says."""
    return KVSchemaConfig(profile=str(path))


def target_of(model: CausalLM, target: Target, path: Path) -> Target:
    """The target for it."""
    return evolve(target, model=profile_of(path).fit(model.spec, model.dtype_name))
