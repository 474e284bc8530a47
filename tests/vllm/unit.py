"""A `PlanScheduler` without an engine around it."""

from collections import deque
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from sagellm_ir.runtime.engines.vllm.scheduler import PlanScheduler
from sagellm_ir.runtime.engines.vllm.targets import PLAN_NAME, WORKER_CLASS
from sagellm_ir.target import DEVICE, HOST, Device, ModelSpec, Target, Tier
from tests.vllm.worker import SymbolicWorker

BLOCK = 4
SPEC = ModelSpec("unit", 2, 64, 4, 2, 16, 128, 50)


def target(blocks: int, host: int = 64, tokens: int = 24, batch: int = 3) -> Target:
    """What the scheduler of `make` is for."""
    return Target(
        engine="vllm",
        block_size=BLOCK,
        max_tokens=tokens,
        max_batch=batch,
        model=SPEC,
        device=Device(step_overhead=1e-9),  # so that sharing pays for a model this small
        tiers=(Tier(DEVICE, blocks), Tier(HOST, host)),
    )


def make(aim: Target, cascade: bool = True, kernels: bool = True, **config: Any) -> PlanScheduler:
    """The scheduler that vLLM would make for such an engine; `config` changes vLLM's configuration.

    Its configuration has the attributes that the scheduler reads.
    """
    text = SimpleNamespace(
        num_attention_heads=SPEC.heads,
        num_key_value_heads=SPEC.kv_heads,
        num_hidden_layers=SPEC.layers,
        hidden_size=SPEC.hidden,
        intermediate_size=SPEC.intermediate,
    )
    model = SimpleNamespace(
        hf_text_config=text,
        served_model_name="unit",
        model="unit",
        dtype=torch.float32,
        max_model_len=aim.tiers[0].blocks * BLOCK,
        disable_cascade_attn=not cascade,
        get_head_size=lambda: SPEC.head_dim,
        get_vocab_size=lambda: SPEC.vocab,
    )
    others = {tier.name: tier.blocks for tier in aim.tiers if tier.name != DEVICE}
    transfer = SimpleNamespace(
        kv_connector="PlanConnector", get_from_extra_config=lambda key, default: others
    )
    page = BLOCK * 2 * SPEC.kv_heads * SPEC.head_dim * SPEC.dtype_bytes
    spec = SimpleNamespace(block_size=BLOCK, num_kv_heads=SPEC.kv_heads, page_size_bytes=page)
    cache = SimpleNamespace(
        num_blocks=aim.tiers[0].blocks + 1, kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)]
    )
    vllm: dict[str, Any] = {
        "model_config": model,
        "kv_transfer_config": transfer,
        "scheduler_config": SimpleNamespace(
            max_num_batched_tokens=aim.max_tokens,
            max_num_seqs=aim.max_batch,
            async_scheduling=False,
        ),
        "parallel_config": SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            worker_cls=WORKER_CLASS if kernels else "auto",
        ),
        "speculative_config": None,
        "additional_config": {},
    }
    return PlanScheduler(SimpleNamespace(**(vllm | config)), cache, None, BLOCK, BLOCK)


def request(
    name: str,
    prompt: tuple[int, ...],
    new: int,
    salt: str | None = None,
    stop: Sequence[int] = (),
    **extra: Any,
) -> Request:
    """vLLM's record of a request; any of `stop` ends its answer."""
    params = SamplingParams(
        max_tokens=new,
        ignore_eos=True,
        stop_token_ids=list(stop),
        extra_args={PLAN_NAME: name, **extra},
    )
    return Request(f"{name}-internal", list(prompt), params, None, cache_salt=salt)


class Core:
    """vLLM's loop around a scheduler and a worker; an asynchronous one asks for a forward before the
    one before has answered."""

    def __init__(self, scheduler: PlanScheduler, asynchronous: bool = False) -> None:
        self.scheduler = scheduler
        self.worker = SymbolicWorker(BLOCK, asynchronous)
        self.answers: dict[str, list[int]] = {}
        """By request."""
        self.ends: dict[str, str] = {}
        """Why requests ended."""
        self._queue: deque[tuple[Any, Any]] = deque()
        self.depth = 1 + asynchronous

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._queue) or self.scheduler.has_requests()

    def tick(self) -> list[Any]:
        """As `EngineCore.step_with_batch_queue` does it."""
        if self.scheduler.has_requests():
            out = self.scheduler.schedule()
            assert len(out.num_scheduled_tokens) <= self.scheduler.target.max_batch
            assert out.total_num_scheduled_tokens <= self.scheduler.target.max_tokens
            self._queue.append((out, self.worker.run(out)))
            more = out.total_num_scheduled_tokens or self.scheduler.has_requests()
            if len(self._queue) < self.depth and more:
                return []
        out, result = self._queue.popleft()
        items = []
        for client in self.scheduler.update_from_output(out, result).values():
            items += client.outputs
            for item in client.outputs:
                name = item.request_id.removesuffix("-internal")
                self.answers.setdefault(name, []).extend(item.new_token_ids)
                if item.finish_reason is not None:
                    self.ends[name] = str(item.finish_reason)
        return items


class Engine:
    """vLLM's `LLMEngine` around a core, as far as an adapter asks it.

    Args:
        core: whose scheduler an adapter drives.
        tokens: that end a request's answer.
        texts: lengths at which its front end finds a stop string in a request's answer.
    """

    def __init__(
        self, core: Core, tokens: Mapping[str, Sequence[int]], texts: Mapping[str, int]
    ) -> None:
        self._core, self._tokens, self._texts = core, tokens, texts
        inner = SimpleNamespace(scheduler=core.scheduler, batch_queue_size=core.depth)
        self.engine_core = SimpleNamespace(engine_core=inner)
        longest = core.scheduler.target.tiers[0].blocks * BLOCK
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=longest))
        self._lengths: dict[str, int] = {}
        """Of the answers of requests that have not ended."""

    def add_request(self, name: str, prompt: Mapping[str, Any], params: SamplingParams) -> None:
        """Its id inside is another one."""
        made = request(
            name,
            prompt["prompt_token_ids"],
            params.max_tokens or 0,
            stop=self._tokens.get(name, ()),
        )
        self._lengths[name] = 0
        self._core.scheduler.add_request(made)

    def abort_request(self, names: Sequence[str]) -> None:
        """At once, in front end and core."""
        for name in names:
            self._lengths.pop(name, None)
            self._core.scheduler.finish_requests(f"{name}-internal", RequestStatus.FINISHED_ABORTED)

    def step(self) -> list[Any]:
        """What its front end makes of a tick of the core."""
        outputs = []
        for item in self._core.tick():
            name = item.request_id.removesuffix("-internal")
            if name not in self._lengths:
                continue
            self._lengths[name] += len(item.new_token_ids)
            reason = None if item.finish_reason is None else str(item.finish_reason)
            if self._lengths[name] == self._texts.get(name) and reason is None:
                self.abort_request([name])
                reason = "stop"
            elif reason is not None:
                del self._lengths[name]
            made = SimpleNamespace(
                token_ids=item.new_token_ids, text="", finish_reason=reason, logprobs=None
            )
            outputs.append(
                SimpleNamespace(request_id=name, finished=reason is not None, outputs=[made])
            )
        return outputs
