"""Which engine `run` makes, from its options."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from attrs import frozen

from sagellm_ir.cli import shared
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.target import ModelSpec, Target

if TYPE_CHECKING:
    from sagellm_ir.runtime.backend import InferenceBackend
    from sagellm_ir.runtime.protocols import KVSchemaConfig

__all__ = ["ENGINES", "EngineChoice", "MakeEngine", "opened"]

ENGINES = ("embedded", "simulator", "vllm", "lmdeploy")
MakeEngine: TypeAlias = "Callable[[Target], InferenceBackend]"


@frozen
class EngineChoice:
    """Which engine to make: the options that choose it."""

    kind: str
    model: str | None
    dtype: str
    kv_schema: str
    ignore_eos: bool = False

    def load(self, shape: ModelSpec) -> tuple[ModelSpec, MakeEngine]:
        """The model's real shape, and what makes the engine for a target with it.

        Args:
            shape: the target's; its name is the model's unless the user names one.

        Raises:
            SageIRError: there is no such model.
        """
        from sagellm_ir.runtime.protocols import KVSchemaConfig

        schema = KVSchemaConfig.parse(self.kv_schema)
        if self.kind == "simulator":
            from sagellm_ir.runtime.engines.simulator import SimulatorEngine

            return schema.fit(shape, self.dtype), SimulatorEngine
        if self.model is None:
            _check_is_here(shape.name)
        name = self.model or shape.name
        with shared.working(f"loading {name}"):
            if self.kind == "embedded":
                return self._embedded(name, schema)
            return self._of_others(name, schema)

    def _embedded(self, name: str, schema: "KVSchemaConfig") -> tuple[ModelSpec, MakeEngine]:
        from sagellm_ir.runtime.engines.embedded import EmbeddedEngine, load_model

        loaded = load_model(name, self.dtype)
        make = partial(EmbeddedEngine, loaded, kv_schema=schema, stop_at_eos=not self.ignore_eos)
        return schema.fit(loaded.spec, loaded.dtype_name), make

    def _of_others(self, name: str, schema: "KVSchemaConfig") -> tuple[ModelSpec, MakeEngine]:
        """vLLM and LMDeploy are loaded when the target is known."""
        from sagellm_ir.runtime.engines.embedded.load import DTYPES, open_model

        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for answers

        def make(target: Target) -> "InferenceBackend":
            from sagellm_ir.runtime.engines.embedded.export import model_folder

            with model_folder(name, self.dtype) as folder:
                if self.kind == "vllm":
                    return self._vllm(folder, target, schema)
                return self._lmdeploy(folder, target, schema)

        shape = open_model(name)[0].spec(DTYPES[self.dtype].itemsize)
        return schema.fit(shape, self.dtype), make

    def _vllm(self, folder: Path, target: Target, schema: "KVSchemaConfig") -> "InferenceBackend":
        from sagellm_ir.runtime.engines.vllm.engine import VLLMBackendAdapter
        from sagellm_ir.runtime.engines.vllm.load import make_engine

        engine = make_engine(folder, target, dtype=self.dtype, kv_schema=schema)
        return VLLMBackendAdapter(engine, stop_at_eos=not self.ignore_eos)

    def _lmdeploy(
        self, folder: Path, target: Target, schema: "KVSchemaConfig"
    ) -> "InferenceBackend":
        from sagellm_ir.runtime.engines.lmdeploy.load import load_engine

        engine: InferenceBackend = load_engine(
            folder, target, self.dtype, stop_at_eos=not self.ignore_eos, kv_schema=schema
        )
        return engine


def _check_is_here(name: str) -> None:
    """A target says which model it is for, not where that is: only packaged ones are found by name.

    Raises:
        SageIRError: this one is not.
    """
    from sagellm_ir.runtime.engines.embedded.load import PACKAGED

    if name not in PACKAGED and not Path(name).exists():
        help_ = f"say which with --model: a folder, a .gguf file, or {', '.join(PACKAGED)}"
        raise SageIRError(Diagnostic(f"the target's model, {name!r}, is not here", help=help_))


@contextmanager
def opened(engine: "InferenceBackend") -> "Iterator[InferenceBackend]":
    """The engine; ended afterwards, if it is of a kind that has to be."""
    if isinstance(engine, AbstractContextManager):
        with engine:
            yield engine
    else:
        yield engine
