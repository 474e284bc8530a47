"""What `make demo` shows: requests -> IR -> passes -> plan -> tokens, on a real model.

Six questions about one document and a session of an agent, compiled together and run on
SmolLM2-135M on this machine's CPU.
"""

from pathlib import Path

from attrs import evolve
from rich.console import Console
from rich.rule import Rule

from sagellm_ir.build import build
from sagellm_ir.cli.timeline import timeline
from sagellm_ir.lowering.lower import lower
from sagellm_ir.lowering.render import plan_text
from sagellm_ir.lowering.verify_plan import verify_plan
from sagellm_ir.passes.instruments import Statistics
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import Pipeline
from sagellm_ir.presets import load_target
from sagellm_ir.requests import load_requests
from sagellm_ir.runtime.engines.embedded import EmbeddedEngine, load_model
from sagellm_ir.runtime.running import RunReport, run_plan
from sagellm_ir.text import print_graph

HERE = Path(__file__).parent
SOURCES = (HERE / "chat_shared_document.jsonl", HERE / "agent_session.jsonl")

console = Console(highlight=False, soft_wrap=True)


def section(title: str) -> None:
    console.print()
    console.print(Rule(title, align="left"))


def show_answers(report: RunReport) -> None:
    for answer in report.answers.values():
        console.print(f"[{answer.request}] {answer.text.strip()}", markup=False)


def main() -> None:
    model = load_model("smollm2-135m")
    assert model.tokenizer is not None
    target = evolve(load_target("cpu"), model=model.spec)
    loaded = load_requests([str(source) for source in SOURCES])

    section("1. Requests become a graph")
    built = build(
        loaded.requests, target, name="demo", tokenizer=model.tokenizer, locations=loaded.locations
    )
    console.print(print_graph(built.graph), markup=False)

    section("2. Passes rewrite it (O2)")
    statistics = Statistics()
    graph = PassManager(Pipeline.parse("O2"), (statistics,)).run(built.graph)
    console.print(print_graph(graph), markup=False)
    console.print(statistics.table())

    section("3. The graph is lowered to a plan")
    sampling = {request.id: request.sampling for request in loaded.requests}
    plan = lower(graph, built.tokens, sampling)
    verify_plan(plan)
    console.print(plan_text(plan, console.width if console.is_terminal else None), markup=False)
    console.print(f"\n{timeline(plan)}", markup=False)

    section("4. The embedded engine runs it")
    planned = run_plan(EmbeddedEngine(model, target), plan)
    show_answers(planned)

    section("5. The same without sharing (O0)")
    plain_graph = PassManager(Pipeline.parse("O0")).run(built.graph)
    plain = run_plan(EmbeddedEngine(model, target), lower(plain_graph, built.tokens, sampling))
    same = all(plain.answers[id].tokens == answer.tokens for id, answer in planned.answers.items())
    console.print(
        f"answers: {'equal, token by token' if same else 'DIFFERENT: please report this'}"
    )
    console.print(
        f"prompt tokens computed: {planned.computed_tokens} instead of {plain.computed_tokens} "
        f"({planned.hit_ratio:.0%} shared)"
    )
    console.print(
        f"time: {planned.seconds:.1f} s instead of {plain.seconds:.1f} s "
        f"({plain.seconds / planned.seconds:.1f} x)"
    )


if __name__ == "__main__":
    main()
