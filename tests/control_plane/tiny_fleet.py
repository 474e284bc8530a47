"""Engines of a tiny model that writes ASCII: one token a character, so text and tokens agree."""

import asyncio
import string
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from attrs import evolve
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from sagellm_ir.request import ChatPrompt, Message, Request, Sampling, TextPrompt
from sagellm_ir.runtime.control_plane.local import LocalMember
from sagellm_ir.runtime.engines import LoadedBackend
from sagellm_ir.runtime.engines.embedded import CausalLM, EmbeddedEngine, random_model
from sagellm_ir.runtime.engines.embedded.tokenizer import ModelTokenizer
from sagellm_ir.runtime.engines.sagellm import SageLLMEngine
from sagellm_ir.target import DEVICE, Target, Tier
from tests.embedded.tiny import BLOCK, SEED, TINY, oracle

MODEL = "tiny"
LETTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
    """Wait until something is so: how long that takes depends on the machine."""
    until = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < until, "it never came to be"
        await asyncio.sleep(0.02)


def tiny_tokenizer() -> ModelTokenizer:
    """One token a character."""
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return ModelTokenizer(inner, TEMPLATE)


def tiny_model() -> CausalLM:
    """Random weights; all engines of a fleet have the same."""
    config = evolve(TINY, vocab=len(LETTERS), max_position=2048)
    model = random_model(config, seed=SEED)
    model.tokenizer = tiny_tokenizer()
    return model


SHARED = tiny_model()


def tiny_engine(engine_id: str, blocks: int = 512) -> SageLLMEngine:
    """An engine that has not been started."""
    target = Target(block_size=BLOCK, tiers=(Tier(DEVICE, blocks),), model=SHARED.spec)
    backend = EmbeddedEngine(SHARED, target)
    loaded = LoadedBackend(backend, target, SHARED.tokenizer, MODEL)
    return SageLLMEngine(loaded, engine_id=engine_id, reserve=4)


@asynccontextmanager
async def tiny_member(engine_id: str) -> AsyncIterator[LocalMember]:
    """A started engine."""
    engine = tiny_engine(engine_id)
    engine.start()
    try:
        yield LocalMember(engine)
    finally:
        engine.stop()


def ask(name: str, text: str, new: int = 24, *, stop: tuple[str, ...] = ()) -> Request:
    """A greedy request of plain text."""
    return Request(name, prompt=TextPrompt(text), max_new_tokens=new, sampling=Sampling(stop=stop))


def chat(name: str, *turns: str, new: int = 24) -> Request:
    """A greedy request of a conversation; user and assistant by turns."""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], turn) for i, turn in enumerate(turns))
    return Request(name, prompt=ChatPrompt(messages), max_new_tokens=new)


def expected(request: Request) -> str:
    """The answer of plain greedy decoding."""
    tokenizer = SHARED.tokenizer
    assert tokenizer is not None
    prompt = request.prompt
    if isinstance(prompt, ChatPrompt):
        tokens = tokenizer.apply_chat_template(prompt.messages)
    else:
        assert isinstance(prompt, TextPrompt)
        tokens = tokenizer.encode(prompt.text)
    return tokenizer.decode(oracle(SHARED, tokens, request.max_new_tokens))
