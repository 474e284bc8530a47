"""One of two gloo ranks: LMDeploy's own call sites of collectives, counted and intercepted.

`python -m tests.lmdeploy.two_ranks RANK FILE` prints JSON; FILE is where the ranks meet.
"""

import json
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from lmdeploy.pytorch import comm
from lmdeploy.pytorch import distributed as wrappers
from lmdeploy.pytorch.backends.default.linear import DefaultLinearImpl
from lmdeploy.pytorch.backends.default.op_backend import DefaultOpsBackend
from lmdeploy.pytorch.nn import norm as norms
from lmdeploy.pytorch.strategies.ar.model_agent import ARModelAgentStrategy

from sagellm_ir.runtime.engines.lmdeploy.collectives import CollectiveCounter


def main(rank: int, meeting: str) -> dict[str, Any]:
    """What this rank saw."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 8), torch.randn(4, 8)
    mine = slice(4 * rank, 4 * rank + 4)
    whole = hidden @ weight.T
    group = dist.group.WORLD

    def row_parallel() -> Any:
        linear = DefaultLinearImpl()
        return linear.forward(hidden[:, mine], weight[:, mine], all_reduce=True, group=group)

    counter = CollectiveCounter()
    counter.start()
    right = [torch.allclose(row_parallel(), whole, atol=1e-5)]
    wrappers.all_reduce(torch.ones(5), group=group)
    told = torch.full((2,), float(rank))
    wrappers.broadcast(told, 1, group=group)
    right.append(told.tolist() == [1.0, 1.0])
    parts = [torch.empty(1), torch.empty(1)]
    wrappers.all_gather(parts, torch.tensor([float(rank)]), group=group)
    right.append([part.item() for part in parts] == [0.0, 1.0])
    wrappers.all_gather_into_tensor(torch.empty(4), torch.ones(2), group=group)
    gathered = wrappers.gather_by_tp_sizes(torch.full((2, 3), float(rank)), [2, 2], group=group)
    right.append(gathered[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0])
    context = types.SimpleNamespace(attn_tp_group=types.SimpleNamespace(gpu_group=group))
    tokens = torch.tensor([rank + 5])
    with ARModelAgentStrategy().broadcast_next_token(tokens, None, context):
        pass
    right.append(tokens.tolist() == [5])
    counter.stop()
    counts = {name: [count.calls, count.bytes] for name, count in counter.counts().items()}
    timed = all(count.seconds > 0 for count in counter.counts().values())

    deferred, plain = (
        fused_norm(row_parallel, hidden),
        _norm(),
    )
    expected = plain(whole, hidden[:, :4])
    right.append(
        all(torch.allclose(a, b, atol=1e-5) for a, b in zip(deferred, expected, strict=True))
    )
    right.append(torch.allclose(row_parallel(), whole, atol=1e-5))
    dist.destroy_process_group()
    return {"right": right, "counts": counts, "timed": timed}


def _norm() -> Any:
    norms.get_backend = lambda: DefaultOpsBackend  # Triton's needs a GPU
    return norms.RMSNorm(4, dtype=torch.float32, device="cpu")


def fused_norm(row_parallel: Any, hidden: torch.Tensor) -> Any:
    """A row-parallel linear whose all-reduce is left out, and done by the norm that follows."""
    held: list[Any] = []

    def defer(name: str, call: Any, args: Any, kwargs: Any) -> Any:
        held.append((call, args, kwargs))

    def fuse(norm: Any, x: torch.Tensor, residual: torch.Tensor) -> Any:
        [(call, args, kwargs)] = held
        assert args[0] is x
        call(*args, **kwargs)
        return norm.impl.forward(x, norm.weight, residual)

    comm.intercept(defer)
    partial = row_parallel()
    comm.intercept(None)
    comm.fuse_norm = fuse
    out = _norm()(partial, hidden[:, :4])
    comm.fuse_norm = None
    return out


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2])))
