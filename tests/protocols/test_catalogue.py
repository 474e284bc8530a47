"""JSON Schemas and the page of all types: valid, complete, and what is really written."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from attrs import asdict, fields

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.schema import field_docs
from sagellm_ir.nodes import Decode, Prefill
from sagellm_ir.runtime.accel import AccelConfig
from sagellm_ir.runtime.backend import InferenceBackend, PlanSource
from sagellm_ir.runtime.config import SageConfig
from sagellm_ir.runtime.protocols import (
    CapabilityDescriptor,
    KVCacheSchema,
    KVChunk,
    KVSchemaConfig,
    QuantizationProfile,
)
from sagellm_ir.runtime.protocols.catalogue import DATA, INTERFACES, document, every_schema, schema
from sagellm_ir.runtime.protocols.serial import from_json, to_json
from sagellm_ir.serial import graph_to_json
from sagellm_ir.text import parse_graph

PAGE = Path(__file__).parents[2] / "docs" / "protocols.md"
KV = KVCacheSchema(2, 1, 4, 2, "int8", "token_head")
VALUES = [
    CapabilityDescriptor("any", device="ascend", device_memory=1 << 36, reserved_blocks=(0,)),
    KV,
    KVSchemaConfig("fp8"),
    QuantizationProfile("fp8_e5m2", "head", ((0.5,),), ((1e-7,),), "m"),
    KVChunk("ü", KV, 3, ("aa", "bb"), bytes(range(96)) + bytes(2 * KV.block_bytes - 96)),
    AccelConfig("off"),
    SageConfig(),
]
GRAPH = """sagellm_ir 1

graph @g {stage = built} {
  request @r0 {prompt = 32, blocks = [0:2], max_new = 4}

  %p = prefill @r0[0:32] : kv<32>
  %d = decode @r0[32:36](%p) : kv<36>
}
"""


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_json_comes_back_and_is_what_the_schema_says(value: Any) -> None:
    text = to_json(value)
    assert from_json(type(value), text) == value
    made = schema(type(value).__name__)
    jsonschema.Draft202012Validator.check_schema(made)
    jsonschema.validate(json.loads(text), made)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**json.loads(text), "unknown": 1}, made)


def test_a_wrong_word_is_no_value_of_the_schema() -> None:
    wrong = {**asdict(KV), "dtype": "int9"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema("KVCacheSchema"))
    with pytest.raises(SageIRError, match="did you mean 'int8'"):
        from_json(KVCacheSchema, json.dumps(wrong))


def test_an_interface_has_no_schema_and_says_so() -> None:
    with pytest.raises(SageIRError, match=r"is an interface.*\n.*protocols\.md"):
        schema(INTERFACES[0].__name__)


def test_a_graph_is_what_its_schema_says() -> None:
    graph = json.loads(graph_to_json(parse_graph(GRAPH)))
    jsonschema.validate(graph, schema("IRGraph"))
    for node in graph["graph"]["nodes"]:
        jsonschema.validate(node, schema("IRNode"))
    assert {Prefill.kind, Decode.kind} == {node["kind"] for node in graph["graph"]["nodes"]}
    graph["graph"]["nodes"][0]["kind"] = "decod"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(graph, schema("IRGraph"))


def test_the_document_of_all_types() -> None:
    found = every_schema()
    jsonschema.Draft202012Validator.check_schema(found)
    assert {cls.__name__ for cls in DATA} <= set(found["$defs"])
    text = json.dumps(found)
    for part in text.split('"#/$defs/')[1:]:
        assert part.partition('"')[0] in found["$defs"]
    assert set(found["x-interfaces"]) == {cls.__name__ for cls in INTERFACES}
    assert {InferenceBackend, PlanSource} <= set(INTERFACES)
    for made in found["x-interfaces"].values():
        assert made["description"]
        assert all(made["members"].values())


def test_an_unknown_type() -> None:
    with pytest.raises(SageIRError, match="did you mean 'KVChunk'"):
        schema("KVChnk")


@pytest.mark.parametrize("cls", DATA[:5], ids=lambda cls: cls.__name__)
def test_every_field_is_documented(cls: type) -> None:
    assert set(field_docs(cls)) >= {field.name for field in fields(cls)}


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == document(), "run `make docs`"
