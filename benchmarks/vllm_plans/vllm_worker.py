"""One side of `vllm.py`, in a process of its own: a vLLM engine, and workloads through it.

Reads a task a line from stdin, writes a result a line to the descriptor that its argument names.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, define, field
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm_workloads import Session, make

from sagellm_ir.presets import load_target
from sagellm_ir.runtime.engines.vllm.load import _environment, engine_settings

PLANNED = ("scheduler_cls", "kv_transfer_config", "disable_cascade_attn")
"""What makes vLLM's settings those of an engine that plans drive."""


def start(task: dict[str, Any]) -> Any:
    """The engine: default vLLM with its prefix caching on, or planned; all else is the same."""
    target = load_target(task["target"], **task["overrides"])
    folder = Path(task["model"])
    with _environment():
        settings = engine_settings(folder, target, task["dtype"])
        settings |= {"skip_tokenizer_init": True, "seed": 0}
        settings["async_scheduling"] = None  # vLLM chooses, for both
        if task["planned"]:
            settings["additional_config"] = {
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
    """Seconds of a forward's `schedule` and `update_from_output` together."""

    def watch(self, scheduler: Any) -> None:
        schedule, update = scheduler.schedule, scheduler.update_from_output

        def timed_schedule(*args: Any) -> Any:
            began = time.perf_counter()
            out = schedule(*args)
            if out.total_num_scheduled_tokens:
                self.spent.append(time.perf_counter() - began)
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


class Driver:
    """Sessions through an engine, as fast as it goes."""

    def __init__(self, engine: Any, sessions: Sequence[Session]) -> None:
        self._engine = engine
        self._said: dict[str, list[int]] = {session.name: [] for session in sessions}
        self._left = {session.name: list(session.turns) for session in sessions}
        self._asked: dict[str, float] = {}
        self._first: list[float] = []
        self._prompts = 0
        self._answers: dict[str, list[int]] = {}

    def run(self) -> dict[str, Any]:
        """Seconds in all and to first tokens, tokens of prompts and answers."""
        began, busy = time.perf_counter(), time.process_time()
        for name in self._left:
            self._ask(name)
        while self._engine.has_unfinished_requests():
            for out in self._engine.step():
                self._take(out)
        return {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - busy,
            "first": self._first,
            "prompts": self._prompts,
            "answers": self._answers,
        }

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
        self._answers[identity] = []
        self._asked[identity] = time.perf_counter()
        self._prompts += len(prompt)
        self._engine.add_request(identity, {"prompt_token_ids": list(prompt)}, params)

    def _take(self, out: Any) -> None:
        tokens = list(out.outputs[0].token_ids)
        asked = self._asked.pop(out.request_id, None) if tokens else None
        if asked is not None:
            self._first.append(time.perf_counter() - asked)
        self._answers[out.request_id] += tokens
        name = out.request_id.rpartition(".")[0]
        if out.finished:
            self._said[name] += self._answers[out.request_id]
            if self._left[name]:
                self._ask(name)


def main() -> None:
    task = json.loads(sys.stdin.readline())
    results = open(int(sys.argv[1]), "w")  # noqa: SIM115
    engine = start(task)
    core = engine.engine_core.engine_core
    steps = Steps()
    steps.watch(core.scheduler)
    config = engine.vllm_config
    said: dict[str, Any] = {
        "asynchronous": config.scheduler_config.async_scheduling,
        "vocab": config.model_config.get_vocab_size(),
    }
    print(json.dumps(said), file=results, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        sessions = make(task["workload"], task["seed"], said["vocab"], task["scale"])
        run = Driver(engine, sessions[: task["most"]]).run()
        print(json.dumps({**run, **steps.take()}), file=results, flush=True)


if __name__ == "__main__":
    main()
