"""Speed of the IR side by side with xDSL, a general compiler framework that is pure Python too.

    python benchmarks/ir_vs_xdsl.py --ops 100000 --repeat 3 --json result.json

Both get as many operations, in groups of ten. xDSL: four operations, the same four again, one that
uses all eight, and a dead one (dialects `arith` and `test`). Ours: a prefix of two prefills that
four requests share, and a prefill and a decode of each. The last row is each one's way to share
work: prefix-dedup of whole prompts here, common-subexpression elimination there. A pass gets a
graph that was just verified, as the pass manager does it, so the graph's columns are there, as xDSL's use
lists are; the row `dedup, cold` makes them anew. Runs alternate, in one process, with the cyclic collector
off for both unless `--collector` lets it run for both; the best of each counts. Times are CPU
seconds of the process, which a busy machine disturbs less; both run in one thread.
"""

import argparse
import gc
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import asdict, frozen
from machine import describe
from rich.console import Console
from rich.table import Table
from xdsl.context import Context
from xdsl.dialects import arith, builtin, test
from xdsl.ir import Operation
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.transforms.common_subexpression_elimination import CommonSubexpressionElimination

from sagellm_ir.graph import IRGraph, RequestDecl
from sagellm_ir.nodes import Decode, IRNode, Prefill
from sagellm_ir.passes.base import PassContext
from sagellm_ir.passes.registry import find_pass
from sagellm_ir.text import parse_graph, print_graph
from sagellm_ir.verify import verify

GOALS = {"parse": 3.0, "print": 5.0, "verify": 5.0, "dedup": 5.0, "dedup, cold": 5.0}
"""How many times faster than xDSL each row should be."""

SHARED, TAIL, ANSWER = 512, 28, 32


@frozen
class Row:
    """Operations a second of both, on the same number of operations."""

    name: str
    ours: float
    xdsl: float

    @property
    def ratio(self) -> float:
        return self.ours / self.xdsl

    @property
    def lost(self) -> bool:
        return self.ratio < GOALS[self.name]


def _request(group: int, number: int) -> RequestDecl:
    first = group * 40
    blocks = (*range(first, first + SHARED // 16), first + 32 + number)
    return RequestDecl(
        f"r{group}.{number}",
        prompt_len=SHARED + TAIL,
        blocks=blocks,
        max_new_tokens=ANSWER,
    )


def shared_graph(ops: int) -> IRGraph:
    """Groups of four requests that share a prefix."""
    requests: list[RequestDecl] = []
    nodes: list[IRNode] = []
    end = SHARED + TAIL
    for group in range(ops // 10):
        members = [_request(group, number) for number in range(4)]
        requests += members
        first, head, doc = members[0].id, f"g{group}.a", f"g{group}.b"
        nodes.append(Prefill(head, first, 0, SHARED // 2))
        nodes.append(Prefill(doc, first, SHARED // 2, SHARED, operands=(head,)))
        for request in members:
            tail, name = f"{request.id}.p", request.id
            nodes.append(Prefill(tail, name, SHARED, end, operands=(doc,)))
            nodes.append(Decode(f"{name}.d", name, end, end + ANSWER, operands=(tail,)))
    return IRGraph("shared", requests=tuple(requests), nodes=tuple(nodes))


def built_graph(ops: int) -> IRGraph:
    """The same requests as `build` makes them: a prefill of the whole prompt, and a decode."""
    requests = tuple(_request(i // 4, i % 4) for i in range(ops // 2))
    nodes: list[IRNode] = []
    end = SHARED + TAIL
    for request in requests:
        name = request.id
        nodes.append(Prefill(f"{name}.p", name, 0, end))
        nodes.append(Decode(f"{name}.d", name, end, end + ANSWER, operands=(f"{name}.p",)))
    return IRGraph("built", requests=requests, nodes=tuple(nodes))


def xdsl_module(ops: int) -> builtin.ModuleOp:
    """Groups of ten operations, of which common-subexpression elimination removes five."""
    base = arith.ConstantOp.from_int_and_width(1, 32)
    found: list[Operation] = [base]
    for group in range(ops // 10):
        halves: list[Operation] = []
        for _ in range(2):
            number = arith.ConstantOp.from_int_and_width(group + 2, 32)
            kinds = (arith.AddiOp, arith.MuliOp, arith.SubiOp)
            halves += [number, *(kind(number, base) for kind in kinds)]
        dead = arith.XOrIOp(halves[0], base)
        found += [*halves, test.TestOp(operands=[op.results[0] for op in halves]), dead]
    return builtin.ModuleOp(found)


def verified(graph: IRGraph) -> IRGraph:
    """A copy of the graph that knows nothing of itself but what the verifier has found out."""
    copy = graph.replace()
    verify(copy)
    return copy


def seconds(prepare: Callable[[], Any], run: Callable[[Any], object], collector: bool) -> float:
    """CPU time of one run; preparing it is not timed."""
    subject = prepare()
    gc.collect()
    if not collector:
        gc.disable()  # how often it runs depends on what else is in memory
    start = time.process_time()
    result = run(subject)
    elapsed = time.process_time() - start
    gc.enable()
    del result  # taking a result apart again is not part of the job
    return elapsed


def _xdsl_context() -> Context:
    context = Context()
    for dialect in (builtin.Builtin, arith.Arith, test.Test):
        context.load_dialect(dialect)
    return context


def measure(ops: int, repeat: int, collector: bool) -> list[Row]:
    """All rows. Each is measured `repeat` times, ours and xDSL's in turn."""
    graph, built, module = shared_graph(ops), built_graph(ops), xdsl_module(ops)
    text, other_text = print_graph(graph), str(module)
    context, dedup = _xdsl_context(), find_pass("prefix-dedup")()
    cse = CommonSubexpressionElimination()
    assert parse_graph(text) == graph
    pairs: dict[str, tuple[tuple[Any, Any], tuple[Any, Any]]] = {
        "parse": (
            (lambda: text, parse_graph),
            (lambda: other_text, lambda source: Parser(context, source).parse_module()),
        ),
        "print": (
            (lambda: graph, print_graph),
            (lambda: module, lambda op: Printer(io.StringIO()).print_op(op)),
        ),
        "verify": (
            (lambda: graph.replace(), verify),
            (lambda: module, lambda op: op.verify()),
        ),
        "dedup": (
            (lambda: verified(built), lambda subject: dedup.run(subject, PassContext())),
            (module.clone, lambda op: cse.apply(context, op)),
        ),
        "dedup, cold": (
            (lambda: built.replace(), lambda subject: dedup.run(subject, PassContext())),
            (module.clone, lambda op: cse.apply(context, op)),
        ),
    }
    rows = []
    for name, (ours, theirs) in pairs.items():
        runs = [(seconds(*ours, collector), seconds(*theirs, collector)) for _ in range(repeat)]
        rows.append(Row(name, ops / min(a for a, _ in runs), ops / min(b for _, b in runs)))
    return rows


def show(rows: list[Row], facts: dict[str, str]) -> None:
    """The table, the machine, and what was lost."""
    console = Console()
    table = Table("row", "ours, ops/s", "xDSL, ops/s", "ratio", "goal", "")
    for row in rows:
        figures = (f"{row.ours:,.0f}", f"{row.xdsl:,.0f}", f"{row.ratio:.1f}x")
        goal = f"{GOALS[row.name]:.0f}x"
        table.add_row(row.name, *figures, goal, "lost" if row.lost else "won")
    console.print(table)
    console.print(", ".join(f"{key}: {value}" for key, value in facts.items()), soft_wrap=True)
    lost = [row.name for row in rows if row.lost]
    console.print(f"lost rows: {', '.join(lost) if lost else 'none'}")


def main() -> None:
    """Measures, prints, and writes JSON when asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ops", type=int, default=100_000, help="operations of each IR")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each row")
    parser.add_argument("--collector", action="store_true", help="leave Python's collector on")
    parser.add_argument("--json", type=Path, help="file for the result as JSON")
    arguments = parser.parse_args()
    facts = describe("xdsl", "lark", "attrs", "numpy")
    rows = measure(arguments.ops // 10 * 10, arguments.repeat, arguments.collector)
    show(rows, facts)
    if arguments.json:
        shown = [asdict(row) | {"ratio": row.ratio, "lost": row.lost} for row in rows]
        arguments.json.write_text(
            json.dumps({"ops": arguments.ops, "machine": facts, "rows": shown}, indent=2) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
