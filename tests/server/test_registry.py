"""The registry of engines: what is in it can be loaded, what is not is refused with advice."""

import importlib
import inspect

import pytest

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.runtime.backend import InferenceBackend
from sagellm_ir.runtime.engines import BACKENDS, load_backend


def test_every_loader_exists_and_takes_a_model() -> None:
    for kind in BACKENDS:
        if kind.missing:
            continue
        module, _, name = kind.loader.partition(":")
        loader = getattr(importlib.import_module(module), name)
        assert next(iter(inspect.signature(loader).parameters)) == "model"


@pytest.mark.parametrize("kind", ["simulator", "embedded"])
def test_a_backend_is_loaded_with_its_model_and_pool(kind: str) -> None:
    loaded = load_backend(kind, "smollm2-135m", overrides={"tiers": {"device": {"blocks": 64}}})
    assert isinstance(loaded.backend, InferenceBackend)
    assert loaded.backend.capability.engine == kind
    assert loaded.model_name == "smollm2-135m"
    assert loaded.target.model.layers == 30
    tier = loaded.target.tier("device")
    assert tier is not None
    assert tier.blocks == 64
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("hello")


def test_what_is_unknown_is_refused_with_advice() -> None:
    with pytest.raises(SageIRError, match="did you mean 'embedded'"):
        load_backend("embeded", "smollm2-135m")
    with pytest.raises(SageIRError, match=r"no option 'dtyp'[^?]*did you mean 'dtype'"):
        load_backend("embedded", "smollm2-135m", dtyp="float32")
    with pytest.raises(SageIRError, match="no model 'nowhere'"):
        load_backend("embedded", "nowhere")
