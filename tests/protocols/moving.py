"""A request that starts on one engine and ends on another."""

from attrs import evolve

from sagellm_ir.lowering.plan import Bind, PlanStep, PrefillChunk
from sagellm_ir.runtime.engines.embedded import EmbeddedEngine, random_model
from sagellm_ir.runtime.protocols import KVChunk, KVSchemaConfig
from sagellm_ir.target import DEVICE, HOST, Target, Tier
from tests.embedded.tiny import BLOCK, SEED, TINY, answers, decode, prefill, prompt, request, run

PROMPT = prompt(37, 1)
NEW = 8
HERE = (9, 3, 4, 5, 20, 22, 21, 7, 8, 30, 31, 32)
THERE = tuple(range(40, 52))
MODEL = random_model(TINY, SEED)


def engine_of(schema: KVSchemaConfig) -> EmbeddedEngine:
    """An engine with the tiny model."""
    spec = schema.fit(MODEL.spec, MODEL.dtype_name)
    tiers = (Tier(DEVICE, 64), Tier(HOST, 8))
    target = Target(block_size=BLOCK, tiers=tiers, model=spec)
    return EmbeddedEngine(MODEL, target, kv_schema=schema)


def start(engine: EmbeddedEngine, tenant: str | None = None) -> KVChunk:
    """Compute the prompt in two chunks but for its last token, and take its KV out."""
    engine.submit(evolve(request("r", PROMPT, NEW), tenant=tenant))
    last = len(PROMPT) - 1
    run(engine, prefill("r", 10, HERE), PlanStep(0, prefill=(PrefillChunk("r", 10, last),)))
    return engine.export_kv("r", "w0")


def finish(engine: EmbeddedEngine, chunk: KVChunk) -> list[int]:
    """Put the KV in, and answer."""
    engine.submit(request("mine", PROMPT, NEW))
    engine.import_kv(chunk, "mine", "w0", THERE[: chunk.blocks])
    rest = PrefillChunk("mine", chunk.tokens, len(PROMPT))
    step = PlanStep(0, binds=(Bind("mine", 0, THERE),), prefill=(rest,))
    return answers(run(engine, step, decode("mine", loops=NEW - 1)))["mine"]
