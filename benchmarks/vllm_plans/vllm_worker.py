"""One side of `vllm.py`, in a process of its own: a vLLM engine, and workloads through it.

Reads a task a line from stdin, writes a result a line to the descriptor that its argument names.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, define, evolve, field
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm_workloads import Session, make

from sagellm_ir.presets import load_target
from sagellm_ir.request import Request, TokenPrompt
from sagellm_ir.runtime import SageLLMEngine
from sagellm_ir.runtime.accel import AccelConfig
from sagellm_ir.runtime.engines import LoadedBackend
from sagellm_ir.runtime.engines.answers import StreamDelta
from sagellm_ir.runtime.engines.vllm.engine import VLLMBackendAdapter
from sagellm_ir.runtime.engines.vllm.load import _environment, engine_settings
from sagellm_ir.target import Target

PLANNED = ("scheduler_cls", "kv_transfer_config", "worker_cls", "additional_config")
"""What makes vLLM's settings those of an engine that plans drive."""


def start(task: dict[str, Any], target: Target) -> Any:
    """The engine: default vLLM with its prefix caching on, or planned; all else is the same."""
    folder = Path(task["model"])
    with _environment():
        accel = AccelConfig("off" if task["side"] == "plans without kernels" else "auto")
        settings = engine_settings(folder, target, task["dtype"], accel=accel)
        settings |= {"skip_tokenizer_init": True, "seed": 0}
        if task["side"] != "default":
            settings["additional_config"] |= {
                "sagellm_pipeline": task["pipeline"],
                "sagellm_target": task["target"],
            }
        else:
            for name in PLANNED:
                settings.pop(name, None)
            settings["enable_prefix_caching"] = True
        return LLMEngine.from_engine_args(EngineArgs(**settings | task["settings"]))


@define
class Steps:
    """Wraps the scheduler of an engine: what its forwards are, and what deciding them takes."""

    tokens: int = 0
    """Of all forwards."""
    forwards: int = 0
    spent: list[float] = field(factory=list)
    """Seconds of a forward's `schedule` and `update_from_output` together, and of its planning where
    that is not in `schedule`."""
    planned: float = 0.0
    """Seconds of planning since the last forward."""

    def watch_planner(self, planner: Any) -> None:
        """Of an engine whose scheduler is given its steps."""
        next_step = planner.next_step

        def timed_next_step(view: Any) -> Any:
            began = time.perf_counter()
            step = next_step(view)
            self.planned += time.perf_counter() - began
            return step

        planner.next_step = timed_next_step

    def watch(self, scheduler: Any) -> None:
        schedule, update = scheduler.schedule, scheduler.update_from_output

        def timed_schedule(*args: Any) -> Any:
            began = time.perf_counter()
            out = schedule(*args)
            if out.total_num_scheduled_tokens:
                self.spent.append(time.perf_counter() - began + self.planned)
                self.planned = 0.0
                self.forwards += 1
                self.tokens += out.total_num_scheduled_tokens
            return out

        def timed_update(out: Any, *args: Any) -> Any:
            began = time.perf_counter()
            found = update(out, *args)
            if out.total_num_scheduled_tokens:
                self.spent[-1] += time.perf_counter() - began
            return found

        scheduler.schedule, scheduler.update_from_output = timed_schedule, timed_update

    def take(self) -> dict[str, Any]:
        """What was seen since the last time."""
        found = asdict(self)
        self.tokens = self.forwards = 0
        self.spent.clear()
        return found


def serve(task: dict[str, Any], target: Target, engine: Any) -> SageLLMEngine:
    """Our engine over vLLM's, as `sagellm-ir llm engine start --backend vllm` has it behind its server."""
    backend = VLLMBackendAdapter(engine, stop_at_eos=False)
    made = backend.target
    fitted = evolve(target, engine="vllm", model=made.model, workers=made.workers)
    served = SageLLMEngine(
        LoadedBackend(backend, fitted, None, task["model"], spill=True),
        pipeline=task["pipeline"],
    )
    served.start()
    return served


@define
class Run:
    """A workload that runs."""

    began: float = field(factory=time.perf_counter)
    busy: float = field(factory=time.process_time)
    first: list[float] = field(factory=list)
    """Seconds from a turn's question to its first token."""
    prompts: int = 0
    """Tokens of all prompts."""
    answers: dict[str, list[int]] = field(factory=dict)
    """By turn."""

    def over(self) -> dict[str, Any]:
        """Seconds in all and to first tokens, tokens of prompts and answers."""
        return {
            "seconds": time.perf_counter() - self.began,
            "cpu_seconds": time.process_time() - self.busy,
            "first": self.first,
            "prompts": self.prompts,
            "answers": self.answers,
        }


async def ask_served(engine: SageLLMEngine, sessions: Sequence[Session]) -> dict[str, Any]:
    """Sessions through our engine, all at once."""
    run = Run()

    async def talk(session: Session) -> None:
        said: list[int] = []
        for at, turn in enumerate(session.turns):
            said += turn.tokens
            identity = f"{session.name}.{len(session.turns) - at - 1}"
            answer = run.answers[identity] = []
            run.prompts += len(said)
            request = Request(identity, prompt=TokenPrompt(tuple(said)), max_new_tokens=turn.new)
            asked = time.perf_counter()
            async for event in engine.stream(request):
                if isinstance(event, StreamDelta):
                    if not answer:
                        run.first.append(time.perf_counter() - asked)
                    answer.append(event.token)
            said += answer

    await asyncio.gather(*map(talk, sessions))
    return run.over()


class Driver:
    """Sessions through vLLM's engine, as fast as it goes."""

    def __init__(self, engine: Any, sessions: Sequence[Session]) -> None:
        self._engine = engine
        self._said: dict[str, list[int]] = {session.name: [] for session in sessions}
        self._left = {session.name: list(session.turns) for session in sessions}
        self._asked: dict[str, float] = {}
        self._run = Run()

    def run(self) -> dict[str, Any]:
        """See `Run.over`."""
        for name in self._left:
            self._ask(name)
        while self._engine.has_unfinished_requests():
            for out in self._engine.step():
                self._take(out)
        return self._run.over()

    def _ask(self, name: str) -> None:
        """The next turn of a session."""
        turn = self._left[name].pop(0)
        prompt = self._said[name]
        prompt += turn.tokens
        identity = f"{name}.{len(self._left[name])}"
        params = SamplingParams(
            temperature=0,
            max_tokens=turn.new,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._run.answers[identity] = []
        self._asked[identity] = time.perf_counter()
        self._run.prompts += len(prompt)
        self._engine.add_request(identity, {"prompt_token_ids": list(prompt)}, params)

    def _take(self, out: Any) -> None:
        tokens = list(out.outputs[0].token_ids)
        asked = self._asked.pop(out.request_id, None) if tokens else None
        if asked is not None:
            self._run.first.append(time.perf_counter() - asked)
        self._run.answers[out.request_id] += tokens
        name = out.request_id.rpartition(".")[0]
        if out.finished:
            self._said[name] += self._run.answers[out.request_id]
            if self._left[name]:
                self._ask(name)


def main() -> None:
    task = json.loads(sys.stdin.readline())
    results = open(int(sys.argv[1]), "w")  # noqa: SIM115
    target = load_target(task["target"], **task["overrides"])
    engine = start(task, target)
    core = engine.engine_core.engine_core
    steps = Steps()
    steps.watch(core.scheduler)
    config = engine.vllm_config
    said: dict[str, Any] = {
        "asynchronous": config.scheduler_config.async_scheduling,
        "vocab": config.model_config.get_vocab_size(),
    }
    served = None
    if task["side"] == "served":
        served = serve(task, target, engine)
        steps.watch_planner(served._loop._planner)
    print(json.dumps(said), file=results, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        asked = make(task["workload"], task["seed"], said["vocab"], task["scale"])
        run = asyncio.run(ask_served(served, asked)) if served else Driver(engine, asked).run()
        print(json.dumps({**run, **steps.take()}), file=results, flush=True)


if __name__ == "__main__":
    main()
