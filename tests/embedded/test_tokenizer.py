"""Streaming text: half characters and stop strings are held back, nothing is lost."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.request import Message
from sagellm_ir.runtime.engines.embedded.tokenizer import Detokenizer, ModelTokenizer


@pytest.fixture(scope="module")
def bytewise() -> ModelTokenizer:
    """A tokenizer with one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return ModelTokenizer(
        inner, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )


def stream(tokenizer: ModelTokenizer, text: str, *stop: str) -> tuple[list[str], bool]:
    """The pieces of a text, one a token, up to a stop string."""
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = []
    for token in tokenizer.encode(text):
        piece, stopped = detokenizer.push(token)
        pieces.append(piece)
        if stopped:
            return pieces, True
    return [*pieces, detokenizer.flush()], False


def test_characters_come_whole(bytewise: ModelTokenizer) -> None:
    text = "né 日本 🙂!"
    pieces, _ = stream(bytewise, text)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[:3] == ["n", "", "é"]


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one END two", ("END",), "one "),
        ("EEND", ("END",), "E"),
        ("aab", ("aaab", "b"), "aa"),
        ("x</s>y", ("</s>", "</"), "x"),
    ],
)
def test_stop_strings_over_tokens(
    bytewise: ModelTokenizer, text: str, stop: tuple[str, ...], shown: str
) -> None:
    pieces, stopped = stream(bytewise, text, *stop)
    assert stopped
    assert "".join(pieces) == shown


def test_a_stop_string_that_does_not_come_is_shown_in_the_end(bytewise: ModelTokenizer) -> None:
    pieces, stopped = stream(bytewise, "one EN", "END")
    assert not stopped
    assert "".join(pieces) == "one EN"
    assert pieces[-1] == "EN"


def test_chat(bytewise: ModelTokenizer) -> None:
    assert bytewise.chat([Message("user", "hi")]) == "user: hi\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "the chat template failed"),
        ("{{ 1 / 0 }}", "the chat template failed"),
        ("{{ ''.__class__.__mro__ }}", "the chat template failed"),
        ("{{ messages.append(1) }}", "the chat template failed"),
    ],
)
def test_a_template_that_fails(
    bytewise: ModelTokenizer, template: str | None, message: str
) -> None:
    with pytest.raises(SageIRError, match=message):
        ModelTokenizer(bytewise.inner, template).chat([Message("user", "hi")])
