"""Text to tokens and back: from a model folder's `tokenizer.json`, or a GGUF file's vocabulary."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.nodes.base import Location
from sagellm_ir.request import Message
from sagellm_ir.runtime.engines.embedded.model_config import read_json

__all__ = ["Detokenizer", "ModelTokenizer"]

_REPLACEMENT = "\ufffd"
_CONTROL = 3
"""GGUF's token type of special tokens."""

# Qwen2's published split pattern, from its tokenizer.json.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@frozen
class ModelTokenizer:
    """A tokenizer and the model's chat template."""

    inner: Tokenizer
    template: str | None = None
    tokens: Mapping[str, str] = {}
    """Special tokens that templates name: `bos_token`, `eos_token`."""

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelTokenizer | None":
        """Of a Hugging Face folder; None when it has no `tokenizer.json`.

        Raises:
            SageIRError: the file is broken.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            inner = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001  (all that tokenizers raises)
            raise _error(f"cannot read the tokenizer: {error}", path) from None
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        template = config.get("chat_template")
        separate = folder / "chat_template.jinja"
        if separate.exists():
            template = separate.read_text(encoding="utf-8")
        if isinstance(template, list):  # several named templates: "default" is the chat's
            named = {entry.get("name"): entry.get("template") for entry in template}
            template = named.get("default")
        tokens = {key: _content(config.get(key)) for key in ("bos_token", "eos_token")}
        return cls(inner, template, {key: text for key, text in tokens.items() if text})

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: Path) -> "ModelTokenizer":
        """Of a GGUF file with a byte-level BPE vocabulary (`gpt2`).

        Raises:
            SageIRError: another kind of vocabulary, or a splitter that is not known here.
        """
        key = "tokenizer.ggml."
        kind, pre = metadata.get(f"{key}model"), metadata.get(f"{key}pre")
        splitters = {"smollm": _digits, "qwen2": _qwen2}
        if kind != "gpt2" or pre not in splitters:
            raise _error(
                f"GGUF vocabulary {kind!r} with splitter {pre!r} is not read here; "
                f"'gpt2' with {' or '.join(map(repr, splitters))} is",
                path,
                help="put the model's tokenizer.json beside converted safetensors weights",
            )
        try:
            words: list[str] = metadata[f"{key}tokens"]
            merges = [tuple(line.split(" ", 1)) for line in metadata[f"{key}merges"]]
            types: Sequence[int] = metadata.get(f"{key}token_type", [1] * len(words))
            inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
        except Exception as error:  # noqa: BLE001  (all that tokenizers raises)
            raise _error(f"broken vocabulary: {error}", path) from None
        inner.pre_tokenizer = splitters[pre]()
        inner.decoder = decoders.ByteLevel()
        special = [word for word, t in zip(words, types, strict=False) if t == _CONTROL]
        inner.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in special])
        ids = {
            name: metadata.get(f"{key}{name[:3]}_token_id") for name in ("bos_token", "eos_token")
        }
        tokens = {n: words[i] for n, i in ids.items() if i is not None and 0 <= i < len(words)}
        return cls(inner, metadata.get("tokenizer.chat_template"), tokens)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text as it is: nothing is put before or after it."""
        return tuple(self.inner.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self.inner.decode(list(tokens), skip_special_tokens=True)
        return text

    def apply_chat_template(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation, up to where the model's answer starts (see `chat`)."""
        return self.encode(self.chat(messages))

    def chat(self, messages: Sequence[Message]) -> str:
        """Messages as one text that ends where the model's answer starts.

        Raises:
            SageIRError: the model has no chat template, or it refuses these messages.
        """
        if self.template is None:
            raise SageIRError(
                Diagnostic(
                    "the model has no chat template",
                    help="write the prompt as text instead of as messages",
                )
            )

        def refuse(reason: str) -> None:
            raise TemplateError(reason)

        # A template is code from a downloaded file: it runs in a sandbox.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        listed = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return environment.from_string(self.template).render(
                messages=listed, add_generation_prompt=True, tools=None, **self.tokens
            )
        except Exception as error:  # noqa: BLE001  (a template can raise anything)
            raise SageIRError(Diagnostic(f"the chat template failed: {error}")) from None


class Detokenizer:
    """Streams one answer's text, holding back half characters and possible stop strings.

    The text of a token can depend on its left neighbour, so each call decodes a short window of
    tokens and takes what is new (the method of Hugging Face's TGI and of vLLM).
    """

    def __init__(self, tokenizer: ModelTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._patterns = re.compile("|".join(map(re.escape, stop))) if stop else None
        self._tokens: list[int] = []
        self._from = 0
        self._read = 0
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token: the text that is certain now, and whether a stop string was completed."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._from : self._read])
        text = self._tokenizer.decode(self._tokens[self._from :])
        if text.endswith(_REPLACEMENT):  # the bytes of a character are not all there
            return "", False
        self._held += text[len(before) :]
        self._from, self._read = self._read, len(self._tokens)
        if self._patterns and (match := self._patterns.search(self._held)):
            text, self._held = self._held[: match.start()], ""
            return text, True
        keep = self._possible_stop()
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return text, False

    def flush(self) -> str:
        """What was held back, when the answer ends here."""
        before = self._tokenizer.decode(self._tokens[self._from : self._read])
        rest = self._tokenizer.decode(self._tokens[self._from :])[len(before) :]
        text, self._held, self._from, self._read = self._held + rest, "", 0, 0
        self._tokens.clear()
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that a stop string starts with."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0


def _digits() -> pre_tokenizers.PreTokenizer:
    """SmolLM's splitter: each digit alone, then GPT-2's."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _qwen2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _content(token: Any) -> str | None:
    """Special tokens are written as text or as an object around it."""
    return token.get("content") if isinstance(token, dict) else token


def _error(message: str, path: Path, help: str = "") -> SageIRError:
    return SageIRError(Diagnostic(message, Location(str(path), 1), help=help))
