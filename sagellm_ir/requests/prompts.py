"""The prompt and the sampling options of an OpenAI-style body."""

from typing import Any

from sagellm_ir.request import ChatPrompt, Message, Prompt, Sampling, TextPrompt, TokenPrompt
from sagellm_ir.requests.fields import Fields

__all__ = ["read_prompts", "read_sampling"]

_TOKENS = ("tokens", "prompt_token_ids", "token_ids", "input_ids")
_TOKEN_ID = (1 << 32) - 1
_GREEDY = Sampling()


def read_prompts(fields: Fields) -> list[Prompt]:
    """The record's prompts: one, or as many as its `prompt` lists."""
    found = [
        (name, value)
        for name, value in (fields.get("messages"), fields.get("prompt"), fields.get(*_TOKENS))
        if value is not None
    ]
    if len(found) != 1:
        _not_one(fields, [name for name, _ in found])
    name, value = found[0]
    if name == "messages":
        return [_chat(fields, value)]
    if name != "prompt" or _holds_integers(value):
        return [_tokens(fields, name, value)]
    if isinstance(value, str):
        return [TextPrompt(_text(fields, name, value))]
    if not isinstance(value, list) or not value:
        fields.expected(name, "a text, a list of texts, or token ids", value)
    return [_listed(fields, f"{name}[{at}]", item) for at, item in enumerate(value)]


def _not_one(fields: Fields, found: list[str]) -> None:
    """Raises: there are no prompts, or several."""
    if found:
        fields.fail(found[1], f"there is a prompt already, in {found[0]!r}", "keep one of them")
    known = ("messages", "prompt", "tokens")
    near = [name for name in fields.unread() if name[:3] in {"mes", "pro", "tok"}]
    help_ = f"is {near[0]!r} misspelt?" if near else "add one of these fields"
    fields.fail("prompt", f"expected one of {', '.join(known)}", help_)


def _listed(fields: Fields, name: str, value: Any) -> Prompt:
    if isinstance(value, str):
        return TextPrompt(_text(fields, name, value))
    return _tokens(fields, name, value)


def _text(fields: Fields, name: str, value: str) -> str:
    if not value:
        fields.expected(name, "a text that is not empty", value)
    return fields.sound(name, value)


def _tokens(fields: Fields, name: str, value: Any) -> TokenPrompt:
    tokens = fields.integers(name, value, "a list of token ids", _TOKEN_ID)
    if not tokens:
        fields.expected(name, "at least one token id", value)
    return TokenPrompt(tokens)


def _holds_integers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and type(value[0]) is int


def _chat(fields: Fields, messages: Any) -> ChatPrompt:
    if not isinstance(messages, list) or not messages:
        fields.expected("messages", "a list of at least one message", messages)
    turns = tuple(_message(fields, f"messages[{at}]", item) for at, item in enumerate(messages))
    goes_on = fields.flag("continue_final_message")
    if goes_on == fields.flag("add_generation_prompt", default=True):
        name = "continue_final_message" if goes_on else "add_generation_prompt"
        message = "either one answer is begun or the last message goes on"
        fields.fail(name, message, "continue_final_message = not add_generation_prompt")
    return _started(fields, turns) if goes_on else ChatPrompt(turns)


def _started(fields: Fields, turns: tuple[Message, ...]) -> ChatPrompt:
    """A conversation whose last message is the start of the answer."""
    if turns[-1].role != "assistant" or len(turns) == 1:
        fields.fail("continue_final_message", "it needs a last message of the assistant")
    return ChatPrompt(turns[:-1], started=turns[-1].content)


def _message(fields: Fields, name: str, message: Any) -> Message:
    if not isinstance(message, dict):
        fields.expected(name, "a message with role and content", message)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        fields.expected(f"{name}.role", "a text such as 'user'", role)
    for call in ("tool_calls", "function_call"):
        if message.get(call):
            fields.fail(
                f"{name}.{call}",
                "calls of tools are not supported",
                "write the call into the message's content as text",
            )
    return Message(role, _content(fields, f"{name}.content", message.get("content")))


def _content(fields: Fields, name: str, content: Any) -> str:
    """Plain text; a list of text parts is joined."""
    if isinstance(content, str):
        return fields.sound(name, content)
    if not isinstance(content, list):
        fields.expected(name, "a text or a list of text parts", content)
    texts = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            got = f"a part of type {kind!r}" if kind else repr(part)[:40]
            fields.fail(
                f"{name}[{at}]",
                f"expected a text part, got {got}",
                "only text is supported: images, audio and files are not",
            )
        text = part.get("text")
        if not isinstance(text, str):
            fields.expected(f"{name}[{at}].text", "a text", text)
        texts.append(fields.sound(f"{name}[{at}].text", text))
    return "".join(texts)


def read_sampling(fields: Fields) -> Sampling:
    """Sampling options. What is absent is greedy: temperature 0, unlike the OpenAI service."""
    top_p = fields.number("top_p", default=1.0, most=1.0)
    if top_p == 0:
        fields.expected("top_p", "a number above 0 and at most 1", top_p)
    sampling = Sampling(
        temperature=float(fields.number("temperature", default=0.0)),
        top_p=float(top_p),
        # -1 is what some servers call "keep all".
        top_k=max(0, fields.integer("top_k", default=0, least=-1)),
        seed=fields.integer("seed"),
        stop=_stop(fields),
    )
    return _GREEDY if sampling == _GREEDY else sampling


def _stop(fields: Fields) -> tuple[str, ...]:
    name, value = fields.get("stop")
    if value is None or isinstance(value, str):
        value = [value] if value else []
    if not isinstance(value, list) or not all(isinstance(s, str) and s for s in value):
        fields.expected(name, "a text or a list of texts that are not empty", value)
    return tuple(fields.sound(name, text) for text in value)
