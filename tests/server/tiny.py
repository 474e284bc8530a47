"""A tiny random model with a tokenizer of bytes, as a loaded backend."""

from functools import cache

from attrs import evolve
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sagellm_ir.runtime.engines import LoadedBackend
from sagellm_ir.runtime.engines.embedded import (
    CausalLM,
    EmbeddedEngine,
    ModelTokenizer,
    random_model,
)
from sagellm_ir.target import Device, Target, Tier
from tests.embedded.tiny import SEED, TINY

BLOCK = 4
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'forbidden' %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
)


@cache
def tiny_model() -> CausalLM:
    """Random weights; a token is a byte, and byte 0 ends an answer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    config = evolve(TINY, vocab=257, max_position=1024, eos=(256,), name="tiny")
    model = random_model(config, seed=SEED)
    model.tokenizer = ModelTokenizer(inner, TEMPLATE)
    return model


def load_tiny(blocks: int = 64) -> LoadedBackend:
    """The tiny model with a pool of so many blocks of four tokens."""
    model = tiny_model()
    target = Target(
        block_size=BLOCK,
        max_tokens=256,
        max_batch=64,
        max_loops=4,
        tiers=(Tier("device", blocks), Tier("host", blocks)),
        model=model.spec,
        device=Device(step_overhead=1e-9),  # so that sharing pays for a model this small
    )
    return LoadedBackend(EmbeddedEngine(model, target), target, model.tokenizer, "tiny")
