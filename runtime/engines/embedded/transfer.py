"""KV of the embedded engine as `KVChunk`s, and back."""

from collections.abc import Sequence as Seq

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.identity import Namespace, chain_hashes
from sagellm_ir.runtime.engines.embedded.sequence import Sequence
from sagellm_ir.runtime.engines.embedded.worker import WorkerMemory
from sagellm_ir.runtime.protocols import KVChunk
from sagellm_ir.target import DEVICE

__all__ = ["pack", "unpack"]


def pack(worker: WorkerMemory, sequence: Sequence, model: str) -> KVChunk:
    """The KV of a sequence's computed tokens; the errors are those of `EmbeddedEngine.export_kv`."""
    request, tokens = sequence.request.id, sequence.computed
    if not tokens or request not in worker.tables:
        message = f"worker {worker.name!r} holds no KV of request {request!r}"
        raise SageIRError(Diagnostic(message))
    schema = worker.pool.schema
    blocks = worker.table(request, tokens).blocks[: -(-tokens // schema.block_size)]
    identities = _identities(sequence, tokens, schema.block_size, model)
    return KVChunk(request, schema, tokens, identities, worker.pool.read(DEVICE, blocks))


def unpack(
    chunk: KVChunk, worker: WorkerMemory, sequence: Sequence, model: str, blocks: Seq[int]
) -> None:
    """A chunk into blocks; the errors are those of `EmbeddedEngine.import_kv`."""
    schema, name = worker.pool.schema, f"request {sequence.request.id!r}"
    if chunk.schema != schema:
        notes = (f"the chunk: {chunk.schema}", f"the engine: {schema}")
        raise SageIRError(Diagnostic(f"the KV for {name} is stored in another way", notes=notes))
    known = min(chunk.tokens, len(sequence.tokens))
    own = _identities(sequence, known, schema.block_size, model)
    if chunk.tokens > len(sequence.tokens) or chunk.identities != own:
        raise SageIRError(
            Diagnostic(
                f"the KV for {name} is not that of its first {chunk.tokens} tokens",
                help="it is of another prompt, model, adapter or tenant",
            )
        )
    worker.pool.write(DEVICE, blocks, chunk.data)
    worker.hold(DEVICE, tuple(blocks))


def _identities(sequence: Sequence, count: int, block_size: int, model: str) -> tuple[str, ...]:
    """See `KVChunk.identities`."""
    request, tokens = sequence.request, sequence.tokens[:count]
    space = Namespace(model, request.adapter, request.tenant)
    hashes = chain_hashes(tokens, block_size, space)
    if count % block_size:
        hashes += chain_hashes(tokens, count, space)
    return tuple(digest.hex() for digest in hashes)
