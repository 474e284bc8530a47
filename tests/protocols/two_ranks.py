"""One of two gloo ranks: every collective, then KV from rank 0's engine to rank 1's.

`python -m tests.protocols.two_ranks RANK FILE KV` prints JSON; FILE is where the ranks meet.
"""

import json
import sys
from typing import Any

import torch

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.comm_backend.torch_comm import TorchComm
from sagellm_ir.runtime.config import CommConfig
from sagellm_ir.runtime.kv_runtime.transport import CommTransport
from sagellm_ir.runtime.protocols import CommBackendProtocol, KVSchemaConfig, TransportEngine
from tests.protocols.moving import engine_of, finish, start


def collectives(comm: CommBackendProtocol) -> list[bool]:
    """Whether each gave what it should."""
    rank = comm.rank
    mine = torch.tensor([1.0 + rank, 10.0])
    comm.all_reduce(mine)
    told = torch.full((2,), float(rank))
    comm.broadcast(told, 1)
    parts = comm.all_gather(torch.tensor([float(rank)]))
    got = [mine.tolist() == [3.0, 20.0], told.tolist() == [1.0, 1.0]]
    got.append([part.item() for part in parts] == [0.0, 1.0])
    comm.barrier()
    if rank:
        comm.send(b"", 0)
        comm.send(b"x" * 99, 0)
        return got
    got.append(comm.receive(1, 10) == b"")
    try:
        comm.receive(1, 98)
    except SageIRError as error:
        got.append("99 bytes; at most 98" in str(error))
    # The refused message's body is still on its way; the next receive would take it.
    body = torch.empty(99, dtype=torch.uint8)
    torch.distributed.recv(body, 1)
    return got


def main(rank: int, meeting: str, dtype: str) -> dict[str, Any]:
    """What this rank saw."""
    comm = TorchComm(f"file://{meeting}", rank, 2, CommConfig(timeout=60.0))
    assert isinstance(comm, CommBackendProtocol)
    right = collectives(comm)
    transport = CommTransport(comm)
    assert isinstance(transport, TransportEngine)
    engine = engine_of(KVSchemaConfig(dtype=dtype))
    if rank == 0:
        transport.send(start(engine), "1")
        answer: list[int] = []
    else:
        answer = finish(engine, transport.receive("0"))
    comm.barrier()
    comm.close()
    return {"right": right, "answer": answer}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2], sys.argv[3])))
