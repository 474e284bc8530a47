"""How KV is stored: sizes, the user's words for it, and other engines' words for it."""

import pytest

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.presets import load_model
from sagellm_ir.runtime.protocols import (
    KVCacheSchema,
    KVSchemaConfig,
    lmdeploy_quant_policy,
    vllm_kv_cache_dtype,
)

QWEN = load_model("qwen2.5-7b")


def test_sizes_count_kv_heads_not_query_heads() -> None:
    assert (QWEN.heads, QWEN.kv_heads, QWEN.head_dim, QWEN.layers) == (28, 4, 128, 28)
    schema = KVCacheSchema.of(QWEN, 16, "bf16")
    assert schema.block_bytes == 2 * 28 * 4 * 128 * 16 * 2
    assert schema.token_bytes == QWEN.kv_bytes_per_token * 2 / QWEN.dtype_bytes


def test_scales_are_counted() -> None:
    plain = 2 * 28 * 4 * 128 * 16
    each = KVCacheSchema.of(QWEN, 16, "int8")
    assert (each.scales, each.block_bytes) == ("token_head", plain + 2 * 28 * 4 * 16 * 4)
    block = KVCacheSchema(28, 4, 128, 16, "fp8_e4m3", "block")
    assert block.block_bytes == plain + 2 * 28 * 4 * 4
    assert KVCacheSchema(28, 4, 128, 16, "fp8_e5m2").block_bytes == plain


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"dtype": "int8"}, "needs scales"),
        ({"dtype": "bf16", "scales": "block"}, "has none"),
        ({"dtype": "int9"}, "did you mean 'int8'"),
        ({"layers": 0}, "layers"),
    ],
)
def test_impossible_schemas(wrong: dict[str, object], word: str) -> None:
    sizes: dict[str, object] = {"layers": 2, "kv_heads": 2, "head_dim": 16, "block_size": 4}
    with pytest.raises(ValueError, match=word):
        KVCacheSchema(**sizes | wrong)  # type: ignore[arg-type]


def test_words() -> None:
    assert KVSchemaConfig.parse("preset=fp8").resolve("bfloat16") == "fp8_e4m3"
    assert KVSchemaConfig.parse("dtype=fp8_e5m2").resolve("bfloat16") == "fp8_e5m2"
    assert KVSchemaConfig().resolve("float32") == "fp32"


@pytest.mark.parametrize(
    ("text", "hint"),
    [("fp8", "preset=fp8"), ("preset=fp9", "'fp8'"), ("prset=fp8", "preset=fp8")],
)
def test_wrong_words(text: str, hint: str) -> None:
    with pytest.raises(SageIRError, match=hint):
        KVSchemaConfig.parse(text)


@pytest.mark.parametrize(
    ("preset", "dtype", "policy"), [("auto", "float16", 0), ("bf16", "bfloat16", 0), ("int8", "float16", 8)]
)  # fmt: skip
def test_lmdeploy(preset: str, dtype: str, policy: int) -> None:
    assert lmdeploy_quant_policy(KVSchemaConfig(preset), dtype) == policy


@pytest.mark.parametrize(("preset", "dtype"), [("fp8", "bfloat16"), ("bf16", "float16")])
def test_lmdeploy_refuses(preset: str, dtype: str) -> None:
    with pytest.raises(SageIRError, match=r"LMDeploy v0\.11\.0 cannot store KV"):
        lmdeploy_quant_policy(KVSchemaConfig(preset), dtype)


@pytest.mark.parametrize(
    ("preset", "dtype", "device", "name"),
    [
        ("auto", "float32", "cpu", "auto"),
        ("bf16", "bfloat16", "cpu", "auto"),
        ("fp8", "bfloat16", "cpu", "fp8_e4m3"),
        ("bf16", "float16", "cuda", "bfloat16"),
        ("fp8", "bfloat16", "cuda", "fp8_per_token_head"),
        ("int8", "bfloat16", "cuda", "int8_per_token_head"),
    ],
)
def test_vllm(preset: str, dtype: str, device: str, name: str) -> None:
    assert vllm_kv_cache_dtype(KVSchemaConfig(preset), dtype, device) == name


def test_vllm_refuses() -> None:
    with pytest.raises(SageIRError, match="vLLM on cpu cannot store KV as int8"):
        vllm_kv_cache_dtype(KVSchemaConfig("int8"), "bfloat16", "cpu")
