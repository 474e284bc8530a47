"""`RequestColumns`: the requests of a graph as flat arrays; all graphs with these requests have them."""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from sagellm_ir.arrays import NONE, Ints, first_places, ints

if TYPE_CHECKING:
    from sagellm_ir.graph import RequestDecl

__all__ = ["RequestColumns"]

_IDS = 1 << 63


class RequestColumns:
    """Arrays by request; index `i` is `requests[i]`."""

    def __init__(self, requests: "Sequence[RequestDecl]") -> None:
        self.requests = requests

    @cached_property
    def index(self) -> dict[str, int]:
        """Requests by id."""
        return {request.id: i for i, request in enumerate(self.requests)}

    @cached_property
    def prompt(self) -> Ints:
        """Tokens of each prompt."""
        return ints([request.prompt_len for request in self.requests])

    @cached_property
    def end(self) -> Ints:
        """Tokens of each request, prompt and answer."""
        return self.prompt + ints([request.max_new_tokens for request in self.requests])

    @cached_property
    def ids(self) -> Ints:
        """The block ids of all requests, one request after the other; an id that is no block id
        (it does not fit 64 bits) shows as -1."""
        blocks = [request.blocks for request in self.requests]
        try:
            return ints(chain.from_iterable(blocks), int(self.id_count.sum()))
        except OverflowError:
            return ints(id if id < _IDS else NONE for ids in blocks for id in ids)

    @cached_property
    def first_id(self) -> Ints:
        """For each of `ids`, where it stands first."""
        return first_places(self.ids)

    @cached_property
    def id_count(self) -> Ints:
        """Block ids of each request."""
        return ints(map(len, [request.blocks for request in self.requests]))

    @cached_property
    def id_start(self) -> Ints:
        """Where the ids of each request start in `ids`."""
        return np.cumsum(self.id_count) - self.id_count

    @cached_property
    def space(self) -> Ints:
        """The namespace of each request: equal for equal adapters and tenants."""
        requests = self.requests
        pairs = list(zip([r.adapter for r in requests], [r.tenant for r in requests], strict=True))
        spaces = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        return ints(map(spaces.__getitem__, pairs))
