"""`CommBackendProtocol`: collectives and messages between the ranks of a group."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CommBackendProtocol"]


@runtime_checkable
class CommBackendProtocol(Protocol):
    """One rank's view of a group. All ranks call the same collectives in the same order."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""
        ...

    @property
    def size(self) -> int:
        """Ranks of the group."""
        ...

    def all_reduce(self, tensor: "Tensor") -> None:
        """Sum over all ranks, in place: what a plan's `allreduce` nodes and `Collective`s are."""
        ...

    def all_gather(self, tensor: "Tensor") -> "list[Tensor]":
        """Every rank's tensor, by rank; all of one shape and type."""
        ...

    def broadcast(self, tensor: "Tensor", source: int) -> None:
        """Overwrite the tensor with that of one rank."""
        ...

    def send(self, data: bytes, to: int) -> None:
        """A message of any length to another rank."""
        ...

    def receive(self, source: int, most: int) -> bytes:
        """The next message from a rank.

        Raises:
            SageIRError: it is longer than `most` bytes.
        """
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...
