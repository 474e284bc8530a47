"""`PlanScheduler`: vLLM's `scheduler_cls` that does what plan steps say, and decides nothing.

It holds vLLM's requests, asks a `PlanSource` for steps, and turns each forward of a step into a
`SchedulerOutput` with the plan's own blocks.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any

from attrs import evolve
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from sagellm_ir.lowering.plan import PlanStep
from sagellm_ir.runtime.backend import EngineStats, EngineView, Finish
from sagellm_ir.runtime.engines.vllm.batch import (
    common_blocks,
    goes_on,
    scheduler_output,
)
from sagellm_ir.runtime.engines.vllm.blocks import BlockLedger
from sagellm_ir.runtime.engines.vllm.interface import BareScheduler
from sagellm_ir.runtime.engines.vllm.online import OnlineSource
from sagellm_ir.runtime.engines.vllm.sequences import Row, Sequence
from sagellm_ir.runtime.engines.vllm.steps import StepForwards
from sagellm_ir.runtime.engines.vllm.targets import (
    plan_name,
    reads_once,
    takes_groups,
    target_of,
)
from sagellm_ir.runtime.engines.vllm.versions import check_version

__all__ = ["PlanScheduler"]

_UNSEEN = EngineView()
"""For a source that is told what happens."""
_FINISHES: dict[RequestStatus, Finish] = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH_CAPPED: "length",
}


class PlanScheduler(BareScheduler):
    """Give it to vLLM as `scheduler_cls`, with `PlanConnector` as its KV connector.

    By itself it plans online (`OnlineSource`), so stock entry points (`LLM`, `vllm serve`) run by
    plans. `VLLMBackendAdapter` drives it: it gives the steps then.

    With asynchronous scheduling vLLM asks for a forward while the one before runs: its tokens are
    `Sequence.pending` then, and the workers have them first. Workers run forwards and copies in
    order, so blocks may be used again as soon as they are free.

    Raises:
        SageIRError: an untested vLLM, or a configuration that plans cannot drive.
    """

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_config: Any,
        structured_output_manager: Any,
        block_size: int,
        hash_block_size: int,
        mm_registry: Any = None,
        include_finished_set: bool = False,
        log_stats: bool = False,
    ) -> None:
        check_version()
        self.target = target_of(vllm_config, kv_cache_config)
        self.takes_groups = takes_groups(vllm_config)
        """Whether vLLM is told of prefixes that all rows share."""
        self.reads_once = reads_once(vllm_config)
        """Whether its workers are told of prefixes that some rows share."""
        self.connector = self.ec_connector = None
        self.kv_cache_config = kv_cache_config
        capacity = {tier.name: tier.blocks for tier in self.target.tiers}
        self.ledger = BlockLedger(self.target.workers[0].name, capacity, block_size)
        self.sequences: dict[str, Sequence] = {}
        """By the name that plans use."""
        self._online = OnlineSource.of(vllm_config, self.target, self.sequences)
        self.driven = False
        """Whether an adapter gives the steps: then it keeps requests that ended until they are released."""
        self.stats = EngineStats()
        self._names: dict[str, str] = {}
        """Plan names by vLLM's request id."""
        self._max_len: int = vllm_config.model_config.max_model_len
        self.ran: list[Row] = []
        """The rows of the last forward."""
        self._given: PlanStep | None = None
        """A step from an adapter that has not begun."""
        self.steps = StepForwards(
            self.ledger, self.target, self.sequences, self._next_step, self.reads_once
        )
        self._flight: deque[list[Row]] = deque()
        """The rows of each forward that was asked for and not answered."""
        self.answered = 0
        """Forwards that were answered, those without rows included."""
        self._before: frozenset[str] = frozenset()
        """vLLM's ids of the requests in the last forward that was asked for."""
        self._leaving: list[str] = []
        """Requests that ended, to be released when their step is over."""
        self._gone: set[str] = set()
        """Requests that the workers are to forget."""
        self._told: dict[int, set[str]] | None = defaultdict(set) if include_finished_set else None
        """Requests that ended, by client, for vLLM's data-parallel front end."""

    # What vLLM calls in each tick.

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """The next forward.

        Raises:
            SageIRError: the source's step cannot run; nothing of it has.
        """
        steps, begun = self.steps, self.steps.begun
        rows = steps.next_rows()
        copies, steps.copies = steps.copies, []
        if not self.driven:
            steps.moves.clear()  # nobody reports them
        if any(
            row.sequence.pending and not goes_on(row, self.ledger, self._before) for row in rows
        ):
            # The workers need tokens that are on their way here: the forward is the next one.
            rows, copies, steps.copies = [], [], copies
            steps.left += 1
        gone, self._gone = self._gone, set()
        size = self.target.block_size
        common = common_blocks(steps.groups, rows, size) if self.takes_groups else 0
        shared = steps.shared if rows else []
        out = scheduler_output(rows, self.ledger, copies, gone, common, shared, self._before)
        self.ran = rows
        self._flight.append(rows)
        self._before = frozenset(row.sequence.request.request_id for row in rows)
        for row in rows:
            row.sequence.pending += row.samples
        prefill = sum(row.stop - row.start for row in rows if not row.decode)
        self._count(
            steps=steps.begun - begun,
            forwards=bool(rows),
            prefill_tokens=prefill,
            decode_tokens=sum(row.decode for row in rows),
            moved_blocks=sum(len(copy.src) for copy in copies),
        )
        return out

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take the tokens of the forward."""
        outputs: dict[int, list[EngineCoreOutput]] = defaultdict(list)
        sampled, made = model_runner_output.sampled_token_ids, 0
        self.answered += 1
        for row in self._flight.popleft():
            sequence, request = row.sequence, row.sequence.request
            sequence.pending -= row.samples
            sequence.computed = max(sequence.computed, row.stop)
            request.num_computed_tokens = sequence.computed
            at = model_runner_output.req_id_to_index[request.request_id]
            tokens = list(sampled[at]) if sampled and not sequence.finish else []
            if tokens:
                outputs[request.client_index].append(
                    self._push(sequence, tokens, at, model_runner_output)
                )
                made += len(tokens)
        self._count(generated=made)
        for request in self._refused():
            ended = EngineCoreOutput(
                request.request_id, [], finish_reason=request.get_finished_reason()
            )
            outputs[request.client_index].append(ended)
        found = {client: EngineCoreOutputs(outputs=items) for client, items in outputs.items()}
        for client, names in (self._told or {}).items():
            found.setdefault(client, EngineCoreOutputs()).finished_requests = names
        if self._told:
            self._told.clear()
        return found

    def _push(self, sequence: Sequence, tokens: list[int], at: int, out: Any) -> EngineCoreOutput:
        request = sequence.request
        stopped = False
        for place, token in enumerate(tokens):
            request.append_output_token_ids(token)
            if stopped := check_stop(request, self._max_len):
                del tokens[place + 1 :]
                break
        wanted = request.sampling_params.num_logprobs if out.logprobs else None
        if stopped:
            self._end(sequence, _FINISHES.get(request.status, "stop"))
        return EngineCoreOutput(
            request.request_id,
            tokens,
            new_logprobs=None if wanted is None else out.logprobs.slice_request(at, len(tokens)),
            new_prompt_logprobs_tensors=out.prompt_logprobs_dict.get(request.request_id),
            finish_reason=request.get_finished_reason() if stopped else None,
            stop_reason=request.stop_reason,
        )

    # Steps.

    def give(self, step: PlanStep) -> None:
        """The next step, from an adapter, when the one before is not `busy`."""
        self._given = step

    @property
    def busy(self) -> bool:
        """Whether forwards of the current step are still to be asked for."""
        return self._given is not None or self.steps.left > 0

    @property
    def asked(self) -> int:
        """Forwards that were asked for, those without rows included."""
        return self.answered + len(self._flight)

    def _next_step(self) -> PlanStep | None:
        while self._leaving:
            self.release(self._leaving.pop())
        if not self.driven:
            return self._online.next_step(_UNSEEN)
        step, self._given = self._given, None
        return step

    def view(self) -> EngineView:
        """What a source is asked with."""
        views = [sequence.view() for sequence in self.sequences.values()]
        prefixes = (self.ledger.cached(view.id, view.computed) for view in views if view.computed)
        return EngineView(
            waiting=tuple(v for v in views if not v.finish and not v.computed),
            running=tuple(v for v in views if not v.finish and v.computed),
            finished=tuple(v for v in views if v.finish),
            cached=tuple(prefix for prefix in prefixes if prefix),
            free=self.ledger.free_blocks(),
        )

    # Requests.

    def add_request(self, request: Any) -> None:
        """A request has come; its steps may name it from now on."""
        name = plan_name(request)
        self.release(name)
        most = min(request.max_tokens, self._max_len - request.num_prompt_tokens)
        sequence = self.sequences[name] = Sequence(name, request, most)
        self._names[request.request_id] = name
        if not self.driven:
            self._online.come(sequence)

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Any]:
        """End requests from outside: aborts, and stop strings that vLLM's front end found."""
        if request_ids is None:
            request_ids = list(self._names)
        ids = (request_ids,) if isinstance(request_ids, str) else request_ids
        ended = []
        for identity in ids:
            sequence = self.sequences.get(self._names.get(identity, ""))
            if sequence is None or sequence.finish:
                continue
            sequence.request.status = finished_status
            self._end(sequence, "abort")
            ended.append(sequence.request)
        return ended

    def release(self, name: str) -> None:
        """Forget a request, here and in the workers. Its blocks stay as the plan says."""
        sequence = self.sequences.pop(name, None)
        if sequence is not None:
            identity = sequence.request.request_id
            del self._names[identity]
            self._gone.add(identity)
            self._online.gone(sequence)
        self.ledger.release(name)

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        sequence.finish = finish
        request = sequence.request
        if self._told is not None:
            self._told[request.client_index].add(request.request_id)
        if not self.driven:
            self._leaving.append(sequence.name)

    def _refused(self) -> Iterator[Any]:
        """Requests that the source will never plan, ended as errors."""
        for name in self._online.take_refused():
            if name in self.sequences:
                request = self.sequences[name].request
                yield from self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)

    def has_requests(self) -> bool:
        """Whether vLLM's loop should ask for a forward."""
        return self.busy if self.driven else bool(super().has_requests())

    def get_num_unfinished_requests(self) -> int:
        """Requests that wait for tokens."""
        return sum(1 for sequence in self.sequences.values() if not sequence.finish)

    def has_finished_requests(self) -> bool:
        """Whether the workers have to be told of an end."""
        return bool(self._gone or self._leaving)

    def get_request_counts(self) -> tuple[int, int]:
        """Running and waiting requests."""
        going = [sequence for sequence in self.sequences.values() if not sequence.finish]
        running = sum(1 for sequence in going if sequence.computed)
        return running, len(going) - running

    def _count(self, **more: float) -> None:
        now = {name: getattr(self.stats, name) + value for name, value in more.items()}
        self.stats = evolve(self.stats, **now)
