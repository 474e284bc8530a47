"""Which engine was sent which prompts: what a router knows of the KV caches behind it.

A router sees text, not tokens, so blocks here are bytes of text; their identity is the same chain
hash that names KV blocks (`sagellm_ir.identity`). Equal text gives equal tokens, so a text block
that an engine was sent is KV that the engine has, unless it evicted it since. The index forgets as
an engine does: the least recently used leaf first, beyond what the engine holds.
"""

from collections import OrderedDict
from collections.abc import Sequence

from sagellm_ir.identity import Namespace, chain_hashes
from sagellm_ir.request import ChatPrompt, Request, TextPrompt, TokenPrompt

__all__ = ["BLOCK_BYTES", "PrefixIndex", "prompt_blocks"]

BLOCK_BYTES = 64
"""Bytes of a text block: about a KV block of 16 tokens at 4 bytes a token."""
DEFAULT_LIMIT = 1 << 16
"""Blocks remembered for an engine that does not tell its KV capacity: 4 MiB of text."""
MESSAGE_END = "\x1e"
ROLE_END = "\x1f"


def prompt_blocks(request: Request, model: str, answer: str = "") -> list[bytes]:
    """The chain hashes of a request's full text blocks.

    Args:
        request: what is asked; its adapter and tenant are part of every block's identity.
        model: as the fleet names it.
        answer: text that was generated for it, which the next turn of the chat starts with.
    """
    prompt = request.prompt
    if isinstance(prompt, TokenPrompt):
        text = ",".join(map(str, prompt.tokens))
    elif isinstance(prompt, ChatPrompt):
        text = MESSAGE_END.join(f"{m.role}{ROLE_END}{m.content}" for m in prompt.messages)
        begun = prompt.started + answer
        text += f"{MESSAGE_END}assistant{ROLE_END}{begun}" if begun else ""
    elif isinstance(prompt, TextPrompt):
        text = prompt.text + answer
    else:
        text = ""
    namespace = Namespace(model, request.adapter, request.tenant)
    return chain_hashes(list(text.encode(errors="surrogatepass")), BLOCK_BYTES, namespace)


class PrefixIndex:
    """The text blocks that each engine was sent and most likely still holds."""

    def __init__(self) -> None:
        self._held: dict[str, OrderedDict[bytes, None]] = {}

    def longest(self, engine: str, blocks: Sequence[bytes]) -> int:
        """How many of a prompt's first blocks an engine holds."""
        held = self._held.get(engine, OrderedDict())
        for count, block in enumerate(blocks):
            if block not in held:
                return count
        return len(blocks)

    def size(self, engine: str) -> int:
        """Blocks held by an engine."""
        return len(self._held.get(engine, {}))

    def add(self, engine: str, blocks: Sequence[bytes], limit: int = DEFAULT_LIMIT) -> None:
        """An engine was sent these; it holds `limit` blocks in all."""
        held = self._held.setdefault(engine, OrderedDict())
        for block in reversed(blocks):  # a parent is used after its children, so it outlives them
            held[block] = None
            held.move_to_end(block)
        while len(held) > limit:
            held.popitem(last=False)

    def forget(self, engine: str) -> None:
        """An engine is gone, and its cache with it."""
        self._held.pop(engine, None)
