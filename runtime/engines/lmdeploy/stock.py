"""What LMDeploy does by its own rules beside a plan: steps that no plan gives, sequences it gave up."""

import logging
import time
from typing import Any

from lmdeploy.messages import RequestMetrics, ResponseType
from lmdeploy.pytorch.messages import MessageStatus
from lmdeploy.pytorch.paging.scheduler import SchedulerOutput

from sagellm_ir.runtime.engines.lmdeploy.kv_manager import KVManager

__all__ = ["answer_aborted", "check_engine", "output_of", "schedule_stock"]

logger = logging.getLogger(__name__)


def check_engine(engine: Any) -> None:
    """Raise a `ValueError` where plans cannot drive an engine."""
    if engine.dist_config.dp > 1:
        raise ValueError("plans cannot drive an engine with data parallelism: its ranks alternate")
    if engine.specdecode_config is not None:
        raise ValueError("plans cannot drive speculative decoding")
    if engine.scheduler.is_ssm:
        raise ValueError("plans cannot drive state-space models: their prefixes cannot be shared")


def schedule_stock(kv: KVManager, is_prefill: bool, prealloc_size: int) -> SchedulerOutput:
    """A step as LMDeploy would schedule it; blocks may be given out anew."""
    scheduler = kv.scheduler
    for seq in scheduler.waiting if is_prefill else scheduler.running:
        if not kv.make_resident(seq):
            kv.release(seq)
    if not is_prefill and not scheduler.has_running():
        return output_of([])  # stock asserts that there is one
    return scheduler.schedule_stock(is_prefill, prealloc_size)


def answer_aborted(engine: Any) -> None:
    """End the answers of sequences that LMDeploy gave up (B6); stock leaves their clients waiting.

    With what they have so far, as at a length limit: an error could be overwritten by a response
    that is still queued, a finish cannot.
    """
    aborted = engine.scheduler.seq_manager.get_sequences(MessageStatus.ABORTED)
    for seq in [*aborted.values()]:
        seq.status = MessageStatus.STOPPED
        logger.warning("session %d outgrew the KV pool: answer ended", seq.session_id)
        data = {"token_ids": seq.generated_ids, "logits": None}
        data["req_metrics"] = RequestMetrics(time.time(), seq.engine_events)
        data["logprobs"] = (seq.resp.data or {}).get("logprobs")
        engine._response(seq.resp, ResponseType.FINISH, data=data)


def output_of(
    running: list[Any],
    swap_in: dict[int, int] | None = None,
    swap_out: dict[int, int] | None = None,
) -> SchedulerOutput:
    """A decision to run these rows, after these moves between the tiers."""
    return SchedulerOutput(running, swap_in or {}, swap_out or {}, {})
