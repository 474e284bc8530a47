"""`PlanWorker`: where it puts our attention, and what it tells it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.lowering.plan import PrefixGroup
from sagellm_ir.runtime.accel import AccelConfig, Gate
from sagellm_ir.runtime.engines.vllm import attention, worker
from sagellm_ir.runtime.engines.vllm.attention import KernelBatches, PrefixAwareBackend
from sagellm_ir.runtime.engines.vllm.targets import accel_of
from sagellm_ir.runtime.engines.vllm.worker import PlanWorker, choose_backend, graph_sizes
from tests.vllm.test_attention import Kernels, implementation, layers


def config(**fields: Any) -> Any:
    """vLLM's, as far as the worker reads it."""
    return SimpleNamespace(
        attention_config=SimpleNamespace(backend=fields.get("backend")),
        model_config=SimpleNamespace(dtype=fields.get("dtype", torch.bfloat16)),
        cache_config=SimpleNamespace(cache_dtype=fields.get("stored", "auto")),
        additional_config=fields.get("additional", {}),
    )


def test_the_backend_is_chosen_where_it_can_be(caplog: pytest.LogCaptureFixture) -> None:
    for backend in (None, AttentionBackendEnum.FLASH_ATTN):
        asked = config(backend=backend)
        assert choose_backend(asked)
        assert asked.attention_config.backend.get_class() is PrefixAwareBackend
    for asked, why in (
        (config(backend=AttentionBackendEnum.TRITON_ATTN), "TRITON_ATTN was asked for"),
        (config(dtype=torch.float32), "float32"),
        (config(stored="fp8"), "fp8"),
    ):
        before = asked.attention_config.backend
        assert not choose_backend(asked)
        assert asked.attention_config.backend is before
        assert why in caplog.text


@pytest.mark.parametrize(
    ("given", "wrong"),
    [({"mode": "of"}, "did you mean 'off'"), ({"mod": "off"}, "mod"), ("off", "sagellm_accel")],
)
def test_settings_that_are_wrong(given: Any, wrong: str) -> None:
    with pytest.raises(SageIRError, match=wrong):
        accel_of(config(additional={"sagellm_accel": given}))


def test_settings() -> None:
    assert accel_of(config()) == AccelConfig()
    given = {"mode": "off", "gate": {"launch": 2e-6}}
    assert accel_of(config(additional={"sagellm_accel": given})) == AccelConfig(
        "off", gate=Gate(launch=2e-6)
    )


def test_the_graphs_of_decodes() -> None:
    for mode, sizes in (
        (CUDAGraphMode.NONE, []),
        (CUDAGraphMode.PIECEWISE, []),
        (CUDAGraphMode.FULL, [1, 8]),
        (CUDAGraphMode.FULL_DECODE_ONLY, [1, 8]),
        (CUDAGraphMode.FULL_AND_PIECEWISE, [1, 8]),
    ):
        asked = SimpleNamespace(cudagraph_mode=mode, cudagraph_capture_sizes=[1, 8])
        assert graph_sizes(asked) == sizes


def test_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the kernels with the cache, compiles them before graphs, and tells them of each forward."""
    happened: list[Any] = []
    for name in ("initialize_from_config", "compile_or_warm_up_model"):
        monkeypatch.setattr(Worker, name, lambda self, *args, name=name: happened.append(name))
    monkeypatch.setattr(
        Worker, "execute_model", lambda self, _: happened.append(self._batches.groups)
    )
    monkeypatch.setattr(attention, "make_attention", lambda *args, **kwargs: Kernels())
    monkeypatch.setattr(
        worker, "get_layers_from_vllm_config", lambda config, kind: layers(implementation())
    )
    monkeypatch.setattr(KernelBatches, "warm_up", lambda self, cache: happened.append(cache))
    made: Any = object.__new__(PlanWorker)
    builder = SimpleNamespace(batches=None)
    made.__dict__ |= {
        "_accel": AccelConfig(),
        "_batches": None,
        "_ours": True,
        "device": "cuda",
        "vllm_config": SimpleNamespace(
            model_config=SimpleNamespace(dtype=torch.bfloat16),
            scheduler_config=SimpleNamespace(max_num_seqs=8),
            compilation_config=SimpleNamespace(
                cudagraph_mode=CUDAGraphMode.NONE, cudagraph_capture_sizes=None
            ),
        ),
        "model_runner": SimpleNamespace(
            input_batch=SimpleNamespace(req_id_to_index={"a": 0}),
            attn_groups=[[SimpleNamespace(metadata_builders=[builder])]],
            kv_caches=["the first layer's cache"],
        ),
    }
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))
    made.initialize_from_config(SimpleNamespace(kv_cache_groups=[group]))
    assert isinstance(builder.batches, KernelBatches)
    made.compile_or_warm_up_model()
    told = SimpleNamespace(groups=[PrefixGroup(0, 16, ("a",))])
    for metadata in (told, None):
        made.execute_model(SimpleNamespace(kv_connector_metadata=metadata))
        assert builder.batches.groups == ()  # no longer
    assert happened == [
        "initialize_from_config",
        "the first layer's cache",
        "compile_or_warm_up_model",
        told.groups,
        (),
    ]
