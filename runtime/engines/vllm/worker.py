"""`PlanWorker`: vLLM's GPU worker, whose attention is told what the rows of a forward share."""

import logging
from typing import Any

from vllm.config import CUDAGraphMode, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from sagellm_ir.runtime.engines.vllm.attention import NATIVE, KernelBatches, batches_of
from sagellm_ir.runtime.engines.vllm.targets import accel_of

__all__ = ["PlanWorker"]

logger = logging.getLogger(__name__)

BACKEND = "sagellm_ir.runtime.engines.vllm.attention.PrefixAwareBackend"


class PlanWorker(Worker):  # type: ignore[misc]  # vLLM has no types
    """Give it to vLLM as `worker_cls`, beside `PlanScheduler`, to have prefix groups read once.

    `--additional-config '{"sagellm_accel": {"mode": "prefix_aware"}}'` sets fields of `AccelConfig`. A model
    or a type of cache that our kernels are not for runs vLLM's own attention, with one log line.

    Raises:
        SageIRError: `sagellm_accel` is no `AccelConfig`.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self._accel = accel_of(vllm_config)
        self._batches: KernelBatches | None = None
        self._ours = self._accel.mode != "off" and choose_backend(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Make the cache, and the kernels for it."""
        super().initialize_from_config(kv_cache_config)
        if self._ours:
            runner = self.model_runner
            config = self.vllm_config
            self._batches = batches_of(
                self._accel,
                get_layers_from_vllm_config(config, Attention),
                block_size=kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
                dtype=config.model_config.dtype,
                max_batch=config.scheduler_config.max_num_seqs,
                sizes=graph_sizes(config.compilation_config),
                rows=lambda: runner.input_batch.req_id_to_index,
                device=self.device,
            )
            for groups in runner.attn_groups:
                for group in groups:
                    for builder in group.metadata_builders:
                        builder.batches = self._batches

    def compile_or_warm_up_model(self) -> Any:
        """Compile the kernels before CUDA graphs hold them."""
        if self._batches is not None:
            self._batches.warm_up(self.model_runner.kv_caches[0])
        return super().compile_or_warm_up_model()

    def execute_model(self, scheduler_output: Any) -> Any:
        """A forward."""
        if self._batches is None:
            return super().execute_model(scheduler_output)
        told = scheduler_output.kv_connector_metadata
        self._batches.groups = getattr(told, "groups", ())  # none by another scheduler
        try:
            return super().execute_model(scheduler_output)
        finally:
            self._batches.groups = ()  # vLLM also runs forwards of its own, to warm up


def choose_backend(vllm_config: Any) -> bool:
    """Make our attention that of the engine's layers, where it can be; whether it is."""
    chosen, model = vllm_config.attention_config.backend, vllm_config.model_config
    stored = vllm_config.cache_config.cache_dtype
    reason = ""
    if chosen not in (None, AttentionBackendEnum.FLASH_ATTN):
        reason = f"attention backend {chosen.name} was asked for"
    elif stored not in NATIVE.get(model.dtype, ()):
        reason = f"{model.dtype} with a cache of type {stored} is not for them"
    if reason:
        logger.warning("prefix-aware attention is off, vLLM's own kernels run: %s", reason)
        return False
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
    return True


def graph_sizes(compilation_config: Any) -> list[int]:
    """Rows of the CUDA graphs that hold whole decodes."""
    whole = compilation_config.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
    return list(compilation_config.cudagraph_capture_sizes or ()) if whole else []
