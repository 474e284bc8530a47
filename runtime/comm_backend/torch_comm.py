"""`TorchComm`: torch.distributed (gloo or NCCL) as a `CommBackendProtocol`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.runtime.config.sections import CommConfig

__all__ = ["TorchComm"]

T = TypeVar("T")


class TorchComm:
    """The default process group of this process, made here and ended by `close`.

    Args:
        meeting: where ranks find each other, as torch's `init_method`: `file:///...`, `tcp://...`.
        rank: of this process, from 0.
        size: ranks of the group.
        config: backend, timeout and network interface.
        device: where tensors of messages lie; with NCCL a GPU.

    Raises:
        SageIRError: the ranks do not find each other in time, or there is a group already.
    """

    def __init__(
        self,
        meeting: str,
        rank: int,
        size: int,
        config: CommConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rank = rank
        self.size = size
        self._device = torch.device(device)
        backend = config.backend
        if backend == "auto":
            backend = "nccl" if self._device.type == "cuda" else "gloo"
        if dist.is_initialized():
            raise SageIRError(Diagnostic("this process is a rank of a group already"))

        def join() -> None:
            dist.init_process_group(
                backend,
                init_method=meeting,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=config.timeout),
            )

        with _interface(config.interface):
            self._run("join the group", join)

    def all_reduce(self, tensor: Tensor) -> None:
        """See `CommBackendProtocol`."""
        self._run("all-reduce", lambda: dist.all_reduce(tensor))

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """See `CommBackendProtocol`."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._run("all-gather", lambda: dist.all_gather(parts, tensor))
        return parts

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """See `CommBackendProtocol`."""
        self._run("broadcast", lambda: dist.broadcast(tensor, source))

    def send(self, data: bytes, to: int) -> None:
        """See `CommBackendProtocol`."""
        length = torch.tensor([len(data)], device=self._device)
        self._run(f"send to rank {to}", lambda: dist.send(length, to))
        if data:
            body = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
            self._run(f"send to rank {to}", lambda: dist.send(body, to))

    def receive(self, source: int, most: int) -> bytes:
        """See `CommBackendProtocol`."""
        length = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._run(f"receive from rank {source}", lambda: dist.recv(length, source))
        size = int(length)
        if not 0 <= size <= most:
            message = f"rank {source} sends {size} bytes; at most {most} are taken"
            raise SageIRError(Diagnostic(message))
        body = torch.empty(size, dtype=torch.uint8, device=self._device)
        if size:
            self._run(f"receive from rank {source}", lambda: dist.recv(body, source))
        return body.cpu().numpy().tobytes()

    def barrier(self) -> None:
        """See `CommBackendProtocol`."""
        self._run("wait for all ranks", dist.barrier)

    def close(self) -> None:
        """See `CommBackendProtocol`."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _run(self, what: str, call: Callable[[], T]) -> T:
        """A call of torch.distributed; what it raises, said in our words."""
        try:
            return call()
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            message = f"rank {self.rank} of {self.size} could not {what}: {reason}"
            raise SageIRError(Diagnostic(message)) from error


@contextmanager
def _interface(name: str | None) -> Iterator[None]:
    """Names the network interface for gloo and NCCL while a group is made."""
    if name is None:
        yield
        return
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    before = {variable: os.environ.get(variable) for variable in variables}
    os.environ.update(dict.fromkeys(variables, name))
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
