"""The online planner over LMDeploy: what reaches the engine is planned, tick by tick."""

import logging
from typing import Any

from attrs import evolve
from lmdeploy.pytorch.messages import MessageStatus

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.plan import PlanRequest, PlanStep
from sagellm_ir.runtime.backend import EngineView, RequestView
from sagellm_ir.runtime.engines.lmdeploy.view import ENDED, WORKER, NamedSequences
from sagellm_ir.runtime.planner import OnlinePlanner
from sagellm_ir.target import DEVICE, HOST, ModelSpec, Target, Tier, Worker

__all__ = ["OnlineSource", "target_of"]

logger = logging.getLogger(__name__)


def target_of(engine: Any, base: Target | None = None) -> Target:
    """The target that an LMDeploy engine is; speeds come from `base` (a preset of its device)."""
    base = base or Target()
    cache, config, model = engine.cache_config, engine.scheduler_config, engine.model_config
    tiers = [evolve(base.tier(DEVICE) or Tier(DEVICE, 0), blocks=cache.num_gpu_blocks)]
    if cache.num_cpu_blocks:
        tiers.append(evolve(base.tier(HOST) or Tier(HOST, 0), blocks=cache.num_cpu_blocks))
    spec = ModelSpec(
        name=str(engine.model_path).rstrip("/").rpartition("/")[2] or "model",
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        intermediate=getattr(model.hf_config, "intermediate_size", 4 * model.hidden_size),
        vocab=model.vocab_size,
        dtype_bytes=model.dtype.itemsize,
    )
    return evolve(
        base,
        name=f"lmdeploy-{base.name}",
        engine="lmdeploy",
        block_size=cache.block_size,
        max_tokens=cache.max_prefill_token_num,
        max_batch=config.max_batches,
        max_loops=config.prefill_interval,
        tp=engine.dist_config.tp,
        mixed=False,
        model=spec,
        tiers=tuple(tiers),
        workers=(Worker(WORKER),),
    )


class OnlineSource:
    """Submits every request that LMDeploy has to an `OnlinePlanner`, and asks it for steps.

    A request that the planner refuses (it could never fit) is left to LMDeploy's own rules. What a
    tick costs is what has come, ended or waits, not what runs.

    Args:
        planner: of the target that the engine is; it may let steps outlast answers.
        requests: those of the driver, which refreshes them.
    """

    def __init__(self, planner: OnlinePlanner, requests: NamedSequences) -> None:
        self.planner = planner
        self._states = requests.scheduler.seq_manager.get_sequences
        self._requests = requests
        self._news = requests.follow()
        self._over: set[int] = set()
        """Sequences whose end the planner knows."""

    def next_step(self, view: EngineView) -> PlanStep | None:
        """See `PlanSource`. It looks at the scheduler, not at the view."""
        self._look()
        live, decoding = self._requests.live, self.planner.decoding
        for number, seq in self._states(MessageStatus.WAITING).items():
            seen = live.get(number)
            if seen is not None and seen.id in decoding and seq.num_history_ids == 0:
                self.planner.lost(seen.id, seq.num_new_tokens)  # LMDeploy needed its blocks
        return self.planner.advance(self._answered)

    def observe(self) -> None:
        """Take in what has come and ended, so that the next tick need not."""
        self._look()
        self.planner.look_ahead()

    def ahead(self) -> PlanStep | None:
        """The next prefill while a step is in flight, or None: there is none, or it is not sure."""
        self._look()
        return self.planner.step_ahead()

    def has_space(self) -> bool:
        """Whether the next step, as far as it is known, has room for requests that are still to come."""
        return self.planner.has_space()

    def prepare(self) -> None:
        """Plan what has come while decodes are in flight."""
        self._look()
        self.planner.look_ahead()
        self.planner.compile_ahead()

    def _look(self) -> None:
        come, gone = self._news.take()
        for seen in gone:
            self._over.discard(seen.seq.seq_id)
            over = seen.seq.status in ENDED
            self.planner.end(seen.id, seen.seq.all_ids if over else None)
        for seen in come:
            self._over.discard(seen.seq.seq_id)
            self._submit(seen)
        for status in ENDED:
            ended = self._states(status)
            for number in ended.keys() - self._over:
                seen = self._requests.live[number]
                self._over.add(number)
                self.planner.end(seen.id, seen.seq.all_ids)

    def _answered(self, name: str) -> int:
        return int(self._requests.found[name].num_new_tokens)

    def _submit(self, seen: RequestView) -> None:
        seq = self._requests.found[seen.id]
        request = PlanRequest(
            seen.id,
            max_new_tokens=seen.max_new_tokens,
            arrival=seq.arrive_time,
            adapter=seq.adapter_name,
            prompt_len=seen.prompt_len,
        )
        try:
            self.planner.submit(request, seq.all_ids[: seen.prompt_len])
            self.planner.meet(seen.id)
        except SageIRError as error:
            logger.warning("not planned: %s", error)
