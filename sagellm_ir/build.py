"""`build`: requests -> a built `IRGraph`, one prefill and one decode each, nothing shared yet."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from typing import Protocol

from attrs import frozen

from sagellm_ir.collecting import no_collections
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.graph import CachedBlocks, IRGraph, RequestDecl
from sagellm_ir.identity import BlockIds, Namespace
from sagellm_ir.nodes import Decode, IRNode, KVNode, Location, Prefill, collective
from sagellm_ir.request import ChatPrompt, Message, Request, TextPrompt, TokenPrompt, TracePrompt
from sagellm_ir.target import DEVICE, Target

__all__ = ["Built", "ByteTokenizer", "Tokenizer", "build"]

_MOST_ERRORS = 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_ODD = re.compile(r"[^A-Za-z0-9_.\-]")


class Tokenizer(Protocol):
    """What `build` needs of a model's tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        """The token ids of raw text."""
        ...

    def apply_chat_template(self, messages: Sequence[Message]) -> Sequence[int]:
        """The token ids of a conversation, up to where the assistant's answer begins."""
        ...


def chat_tokens(tokenizer: Tokenizer, prompt: ChatPrompt) -> tuple[int, ...]:
    """The token ids of a conversation, and of the answer's start if it has one."""
    tokens = tuple(tokenizer.apply_chat_template(prompt.messages))
    return tokens + tuple(tokenizer.encode(prompt.started)) if prompt.started else tokens


class ByteTokenizer:
    """One token a UTF-8 byte: shows how prompts share without any model at hand.

    A conversation becomes `<|role|>`, a line break, the content and a line break for each message,
    then `<|assistant|>` and a line break.
    """

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`, 0 to 255."""
        return list(text.encode())

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """The bytes of the conversation."""
        turns = [f"<|{message.role}|>\n{message.content}\n" for message in messages]
        return self.encode("".join([*turns, "<|assistant|>\n"]))


@frozen
class Built:
    """What `build` made."""

    graph: IRGraph
    tokens: Mapping[str, tuple[int, ...]]
    """The prompt's token ids by request id; requests of a trace have none."""
    block_ids: BlockIds
    """What the graph's block ids stand for. Pass it to the next `build` to keep their meaning."""


@no_collections()
def build(
    requests: Sequence[Request],
    target: Target,
    *,
    name: str = "main",
    tokenizer: Tokenizer | None = None,
    cache: Iterable[CachedBlocks] = (),
    block_ids: BlockIds | None = None,
    locations: Mapping[str, Location] | None = None,
) -> Built:
    """Tokenises the prompts, numbers their blocks and makes the graph that computes each alone.

    Request `r` gets `%r.p = prefill @r[0:n]` and `%r.d = decode @r[n:n+max_new](%r.p)`, on a
    tensor-parallel target also their collectives. Turns of one session are ordered by arrival:
    the prefill of a turn comes after the decode of the turn before it.

    Args:
        requests: in the order the graph declares them.
        target: what the graph is for; its block size and model name make up block identities.
        name: the graph's name.
        tokenizer: for prompts of text and chat; prompts of tokens and traces need none.
        cache: what the engine's tiers hold already, numbered by `block_ids`.
        block_ids: numbering to go on with; its block size must be the target's.
        locations: where requests were written, by id.

    Raises:
        SageIRError: up to 20 diagnostics: an id used twice, an empty prompt, text without a
            tokenizer, a token outside the vocabulary, a trace whose block size does not fit, or a
            request that is larger than the target's KV pool.
        ValueError: `block_ids` has another block size than the target.
    """
    numbering = BlockIds(target.block_size) if block_ids is None else block_ids
    if numbering.block_size != target.block_size:
        raise ValueError(f"block_ids of {numbering.block_size} tokens, not {target.block_size}")
    front = _FrontEnd(target, numbering, tokenizer, locations or {})
    decls = front.declare(requests)
    if front.errors:
        more = len(front.errors) - _MOST_ERRORS
        count = Diagnostic(f"{more} more of {len(requests)} requests are wrong")
        rest = [count] if more > 0 else []
        raise SageIRError(*front.errors[:_MOST_ERRORS], *rest)
    graph = IRGraph(name, target, decls, _nodes(decls, target), tuple(cache))
    return Built(graph, front.tokens, numbering)


class _FrontEnd:
    """Requests -> declarations: tokenises, hashes and checks; collects what is wrong."""

    def __init__(
        self,
        target: Target,
        block_ids: BlockIds,
        tokenizer: Tokenizer | None,
        locations: Mapping[str, Location],
    ) -> None:
        self.target = target
        self.block_ids = block_ids
        self.tokenizer = tokenizer
        self.locations = locations
        self.tokens: dict[str, tuple[int, ...]] = {}
        self.errors: list[Diagnostic] = []
        tier = target.tier(DEVICE)
        self.pool = tier.blocks if tier else 0
        self.namespaces: dict[tuple[str | None, str | None], Namespace] = {}

    def declare(self, requests: Sequence[Request]) -> tuple[RequestDecl, ...]:
        decls: dict[str, RequestDecl] = {}
        for request in requests:
            if request.id in decls:
                self.error(request, "its id is used twice", "give each request its own id")
                continue
            try:
                length, blocks = self.prompt(request)
            except SageIRError as error:
                found = error.diagnostics[0]
                self.error(request, found.message, found.help)
                continue
            decls[request.id] = self.decl(request, length, blocks)
        return tuple(decls.values())

    def decl(self, request: Request, length: int, blocks: tuple[int, ...]) -> RequestDecl:
        return RequestDecl(
            id=request.id,
            max_new_tokens=request.max_new_tokens,
            arrival=request.arrival,
            priority=request.priority,
            deadline=request.deadline,
            adapter=request.adapter,
            tenant=request.tenant,
            session=request.session,
            prompt_len=length,
            blocks=blocks,
            loc=self.locations.get(request.id),
        )

    def prompt(self, request: Request) -> tuple[int, tuple[int, ...]]:
        """The prompt's length in tokens, and its block ids."""
        key = (request.adapter, request.tenant)
        namespace = self.namespaces.get(key)
        if namespace is None:
            namespace = self.namespaces[key] = Namespace(self.target.model.name, *key)
        prompt = request.prompt
        if isinstance(prompt, TracePrompt):
            self.fits(request, prompt.length)
            return prompt.length, self.block_ids.of_trace(prompt, namespace)
        tokens = self.tokenise(prompt)
        self.fits(request, len(tokens))
        vocab = self.target.model.vocab
        if min(tokens) < 0 or max(tokens) >= vocab:
            odd = next(token for token in tokens if not 0 <= token < vocab)
            message = f"token {odd} is outside the vocabulary of {self.target.model.name} ({vocab})"
            raise _wrong(message, "tokenise with the tokenizer of the target's model")
        self.tokens[request.id] = tokens
        return len(tokens), self.block_ids.of_tokens(tokens, namespace)

    def tokenise(self, prompt: TextPrompt | ChatPrompt | TokenPrompt) -> tuple[int, ...]:
        if isinstance(prompt, TokenPrompt):
            return prompt.tokens
        if self.tokenizer is None:
            help_ = "pass the model's tokenizer, or ByteTokenizer() to look at sharing only"
            raise _wrong("its prompt is text, and there is no tokenizer", help_)
        if isinstance(prompt, ChatPrompt):
            return chat_tokens(self.tokenizer, prompt)
        return tuple(self.tokenizer.encode(prompt.text))

    def fits(self, request: Request, length: int) -> None:
        """Refuses a prompt that is empty or, with its answer, larger than the KV pool."""
        if length < 1:
            raise _wrong("its prompt is empty", "a prompt has at least one token")
        stop, size = length + request.max_new_tokens, self.target.block_size
        if stop > self.pool * size:
            message = (
                f"it needs {-(-stop // size)} blocks of {size} tokens (prompt {length} + max_new "
                f"{request.max_new_tokens}), and target {self.target.name!r} has {self.pool} on "
                "the device"
            )
            help_ = "lower max_new_tokens, shorten the prompt or enlarge the tier"
            raise _wrong(message, help_)

    def error(self, request: Request, message: str, help_: str) -> None:
        text = f"request {request.id!r}: {message}"
        self.errors.append(Diagnostic(text, self.locations.get(request.id), help=help_))


def _wrong(message: str, help_: str) -> SageIRError:
    return SageIRError(Diagnostic(message, help=help_))


def _nodes(decls: Sequence[RequestDecl], target: Target) -> tuple[IRNode, ...]:
    """The nodes of all requests, in topological order."""
    stems = _stems(decl.id for decl in decls)
    nodes: list[IRNode] = []
    last: dict[tuple[str | None, str], str] = {}
    for decl in _turns_in_order(decls):
        stem = stems[decl.id]
        prefill, decode = f"{stem}.p", f"{stem}.d"
        after: tuple[str, ...] = ()
        if decl.session is not None:
            session = (decl.tenant, decl.session)
            after = (last[session],) if session in last else ()
            last[session] = decode
        made: list[KVNode] = [
            Prefill(prefill, decl.id, 0, decl.prompt_len, after=after, loc=decl.loc),
            Decode(decode, decl.id, decl.prompt_len, decl.stop, operands=(prefill,), loc=decl.loc),
        ]
        nodes += made
        if target.tp > 1:
            nodes += [collective(node, target, f"{node.name}.sum") for node in made]
    return tuple(nodes)


def _turns_in_order(decls: Sequence[RequestDecl]) -> Sequence[RequestDecl]:
    """The requests as they stand, but each session's turns, within its places, by arrival."""
    places: dict[tuple[str | None, str], list[int]] = defaultdict(list)
    for at, decl in enumerate(decls):
        if decl.session is not None:
            places[decl.tenant, decl.session].append(at)
    ordered = list(decls)
    for turns in places.values():
        by_arrival = sorted(turns, key=lambda at: decls[at].arrival)
        for place, at in zip(turns, by_arrival, strict=True):
            ordered[place] = decls[at]
    return ordered


def _stems(ids: Iterable[str]) -> dict[str, str]:
    """A name each that the text prints without quotes; ids that are such names stay as they are."""
    requests = list(ids)
    stems = {request: request for request in requests if _NAME.fullmatch(request)}
    taken = set(stems)
    for request in requests:
        if request not in stems:
            base = _ODD.sub("_", f"_{request}" if request[:1] in ".-" else request)
            names = chain([base], (f"{base}.{number}" for number in count(1)))
            stems[request] = next(name for name in names if name not in taken)
            taken.add(stems[request])
    return stems
