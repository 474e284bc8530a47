"""A `PlanScheduler` without an engine around it."""

from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from sagellm_ir.runtime.engines.vllm.scheduler import PlanScheduler
from sagellm_ir.runtime.engines.vllm.targets import PLAN_NAME
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


def make(aim: Target, cascade: bool = True, **config: Any) -> PlanScheduler:
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
            tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1
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
        self._depth = 1 + asynchronous

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._queue) or self.scheduler.has_requests()

    def tick(self) -> None:
        """As `EngineCore.step_with_batch_queue` does it."""
        if self.scheduler.has_requests():
            out = self.scheduler.schedule()
            assert len(out.num_scheduled_tokens) <= self.scheduler.target.max_batch
            assert out.total_num_scheduled_tokens <= self.scheduler.target.max_tokens
            self._queue.append((out, self.worker.run(out)))
            if len(self._queue) < self._depth and self.scheduler.has_requests():
                return
        out, result = self._queue.popleft()
        for client in self.scheduler.update_from_output(out, result).values():
            for item in client.outputs:
                name = item.request_id.removesuffix("-internal")
                self.answers.setdefault(name, []).extend(item.new_token_ids)
                if item.finish_reason is not None:
                    self.ends[name] = str(item.finish_reason)
