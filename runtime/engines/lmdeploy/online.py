"""The online planner over LMDeploy: what reaches the engine is planned, tick by tick."""

import logging
from typing import Any

from attrs import evolve

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.plan import PlanRequest, PlanStep
from sagellm_ir.runtime.backend import EngineView, RequestView
from sagellm_ir.runtime.engines.lmdeploy.view import WORKER, Names
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
    """Submits every request that LMDeploy reports to an `OnlinePlanner`, and asks it for steps.

    A request that the planner refuses (it could never fit) is left to LMDeploy's own rules.
    """

    def __init__(self, planner: OnlinePlanner, scheduler: Any, names: Names) -> None:
        self.planner = planner
        self._scheduler = scheduler
        self._names = names
        self._known: set[str] = set()
        self._ended = 0

    def next_step(self, view: EngineView) -> PlanStep | None:
        """See `PlanSource`."""
        here = [*view.waiting, *view.running]
        for seen in here:
            if seen.id not in self._known:
                self._known.add(seen.id)
                self._submit(seen)
        if len(self._known) > len(here):
            self._known.intersection_update(seen.id for seen in here)
        self._ended = len(view.finished)
        return self.planner.next_step(view)

    def ahead(self, view: EngineView) -> PlanStep | None:
        """The next prefill while one is in flight, or None: not planned yet, or not sure.

        Args:
            view: with the sequences in flight. Each must have more than one token to come.
        """
        here = [*view.waiting, *view.running]
        step = self.planner.peek()
        changed = len(view.finished) != self._ended or len(here) != len(self._known)
        if step is None or not step.prefill or step.kv or changed:
            return None
        if any(seen.id not in self._known or seen.max_new_tokens < 2 for seen in here):
            return None
        return self.planner.next_step(view)

    def _submit(self, seen: RequestView) -> None:
        seq = self._names.sequence(self._scheduler, seen.id)
        request = PlanRequest(
            seen.id,
            max_new_tokens=seen.max_new_tokens,
            arrival=seq.arrive_time,
            adapter=seq.adapter_name,
            prompt_len=seen.prompt_len,
        )
        try:
            self.planner.submit(request, seq.all_ids[: seen.prompt_len])
        except SageIRError as error:
            logger.warning("not planned: %s", error)
