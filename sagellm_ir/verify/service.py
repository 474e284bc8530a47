"""Laws of service: every request gets its whole answer, once."""

from collections.abc import Iterator

import numpy as np

from sagellm_ir.arrays import NONE, places
from sagellm_ir.columns import Columns
from sagellm_ir.verify.report import Finding

__all__ = ["LAWS"]


def answered_once(c: Columns) -> Iterator[Finding]:
    """The decodes of a request cover its answer without gap or overlap."""
    decodes = c.is_decode.nonzero()[0]
    if not (c.request[decodes[1:]] > c.request[decodes[:-1]]).all():  # as it nearly always is
        decodes = decodes[np.lexsort((c.start[decodes], c.request[decodes]))]
    request, start, stop = c.request[decodes], c.start[decodes], c.stop[decodes]
    expected = c.prompt[request] if len(c.prompt) else np.zeros_like(start)
    again = (request[1:] == request[:-1]).nonzero()[0]
    expected[again + 1] = stop[again]
    for k in places(start != expected):
        asked = c.graph.requests[request[k]]
        how = "left out" if start[k] > expected[k] else "generated twice"
        low, high = sorted((int(start[k]), int(expected[k])))
        yield Finding(f"tokens [{low}:{high}] of @{asked.id} are {how}", int(decodes[k]))
    reached = np.full(len(c.prompt), NONE, dtype=np.int64)
    np.maximum.at(reached, request, stop)
    for k in places(reached != c.end):
        asked = c.graph.requests[k]
        if reached[k] == NONE:
            yield Finding(
                f"request @{asked.id} has no decode: nothing generates its "
                f"{asked.max_new_tokens} tokens",
                request=asked,
            )
        elif reached[k] < asked.stop:
            yield Finding(
                f"tokens [{reached[k]}:{asked.stop}] of @{asked.id} are left out", request=asked
            )


def prompt_ends_once(c: Columns) -> Iterator[Finding]:
    """One prefill ends the prompt of a request: the first token comes out of it, once."""
    ends = c.is_prefill.nonzero()[0]
    ends = ends[c.stop[ends] == c.prompt[c.request[ends]]] if len(c.prompt) else ends[:0]
    count = np.bincount(c.request[ends], minlength=len(c.prompt))
    for k in places(count != 1):
        asked = c.graph.requests[k]
        if count[k]:
            node = int(ends[c.request[ends] == k][1])
            message = f"%{c.names[node]} ends the prompt of @{asked.id} a second time"
            yield Finding(message, node, help="its first token would be drawn twice")
        else:
            yield Finding(
                f"no prefill ends the prompt of @{asked.id} (token {asked.prompt_len - 1})",
                request=asked,
                help="the last token of a prompt must be computed, even when its KV is cached",
            )


def decode_follows_own_prompt(c: Columns) -> Iterator[Finding]:
    """The prefix of a decode is KV of its own request: its last token is the decode's input."""
    decodes = np.flatnonzero(c.is_decode & (c.prefix != NONE))
    for i in decodes[c.request[decodes] != c.request[c.prefix[decodes]]].tolist():
        yield Finding(f"the prefix %{c.names[c.prefix[i]]} is of another request", i)


LAWS = (answered_once, prompt_ends_once, decode_follows_own_prompt)
