"""`explain`: what the compiler does with one request, and why."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from attrs import asdict

from sagellm_ir.cli import shared
from sagellm_ir.cli.compiling import choose_pipeline, start

if TYPE_CHECKING:
    from sagellm_ir.lowering.explain import Explanation

__all__ = ["add_to"]

BECAUSE = {
    "tokens": "the step's token budget was used up",
    "batch": "the step's batch was full",
    "kv": "its KV did not fit beside that of the requests before it",
    "order": "it had to wait for an earlier turn, or for KV another request was making",
    "priority": "another request was ahead of it",
}


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    example = "age --request examples/chat_shared_document.jsonl"
    shared.command(app, "explain", example=example)(explain)


def explain(
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="Which request.")],
    request: shared.Requests = None,
    level: shared.Level = 2,
    pipeline: shared.PipelineText = None,
    target: shared.TargetName = "cpu",
    overrides: shared.Overrides = None,
    tokenizer: shared.TokenizerName = "auto",
    skip_bad: shared.SkipBad = False,
    limit: shared.Limit = None,
    max_new: shared.MaxNew = 128,
    as_json: shared.AsJson = False,
) -> None:
    """Why a request waited, what it shared with others, and what was evicted for it."""
    from sagellm_ir.lowering.explain import explain_request

    compilation = start(request, target, overrides, tokenizer, skip_bad, limit, max_new)
    passes = choose_pipeline(level, pipeline)
    explanation = explain_request(compilation.graph, passes, request_id)
    if as_json:
        shared.emit_json(asdict(explanation))
    else:
        shared.emit("\n".join(_lines(request_id, explanation)))


def _lines(request_id: str, found: "Explanation") -> Iterator[str]:
    yield f"request {request_id}"
    yield (
        f"  runs in steps {found.first} to {found.last}, "
        f"{found.start * 1e3:.1f} ms to {found.end * 1e3:.1f} ms of predicted time"
    )
    if found.waited:
        for limit, steps in found.waited.most_common():
            yield f"  waited {steps} steps: {BECAUSE[limit.value]}"
    else:
        yield "  did not wait"
    yield "  its prompt:"
    for span in found.spans:
        owner = "" if span.how == "computed" else f" ({span.how}; made for request {span.by})"
        others = f", read by {len(span.others)} other requests" if span.others else ""
        what = f"%{span.node} in step {span.step}"
        yield f"    tokens [{span.start}:{span.stop})  {what}{owner}{others}"
    yield f"  its answer: decoded in steps {found.decode_steps[0]} to {found.decode_steps[1]}"
    if found.evictions:
        yield "  moved in the steps in which it started work:"
        for move in found.evictions:
            yield f"    step {move.step}: {move.what} %{move.node}, {move.blocks} blocks"
    else:
        yield "  nothing was evicted for it"
