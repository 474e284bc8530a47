"""A tiny model, plain greedy decoding, and small words for plans."""

from collections.abc import Iterable, Sequence

import torch

from sagellm_ir.lowering.plan import Bind, PlanRequest, PlanStep, PrefillChunk
from sagellm_ir.runtime.backend import TokenEvent
from sagellm_ir.runtime.engines.embedded import CausalLM, EmbeddedEngine, ModelConfig
from sagellm_ir.runtime.engines.embedded.calibrate import forward_all
from sagellm_ir.runtime.engines.embedded.pages import NativePages

BLOCK = 4
SEED = 3

TINY = ModelConfig(
    architecture="llama",
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=96,
    vocab=199,
    max_position=512,
)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, TINY.vocab, (length,), generator=generator).tolist())


def request(name: str, tokens: Sequence[int], new: int) -> PlanRequest:
    """A request of a plan."""
    return PlanRequest(name, max_new_tokens=new, prompt_len=len(tokens), tokens=tuple(tokens))


def oracle(model: CausalLM, tokens: Sequence[int], new: int) -> list[int]:
    """Greedy decoding without planning, paging or a cache: all tokens again for each new one."""
    known = list(tokens)
    for _ in range(new):
        size = len(known)
        config = model.config
        cache = [
            NativePages(torch.zeros(2, config.kv_heads, size, config.head_dim))
            for _ in range(config.layers)
        ]
        known.append(int(forward_all(model, cache, known)[-1].argmax()))
    return known[len(tokens) :]


def answers(events: Iterable[TokenEvent]) -> dict[str, list[int]]:
    """Tokens by request."""
    found: dict[str, list[int]] = {}
    for event in events:
        if event.token is not None:
            found.setdefault(event.request, []).append(event.token)
            assert event.index == len(found[event.request]) - 1
    return found


def run(engine: EmbeddedEngine, *steps: PlanStep) -> list[TokenEvent]:
    """Run steps in order."""
    return [event for step in steps for event in engine.step(step)]


def blocks_of(tokens: int, first: int) -> tuple[int, ...]:
    """Neighbouring blocks for this many tokens."""
    return tuple(range(first, first - (-tokens // BLOCK)))


def prefill(name: str, stop: int, blocks: Iterable[int], start: int = 0) -> PlanStep:
    """Bind a whole table and run one chunk."""
    chunk = PrefillChunk(name, start, stop)
    return PlanStep(0, binds=(Bind(name, 0, tuple(blocks)),), prefill=(chunk,))


def decode(*names: str, loops: int = 1) -> PlanStep:
    """Decode rows only."""
    return PlanStep(1, decode=names, loops=loops)
