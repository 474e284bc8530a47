"""From the command line's options to a built graph, and on to a plan."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from attrs import asdict, frozen

from sagellm_ir.build import ByteTokenizer, Tokenizer, build
from sagellm_ir.cli import shared
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.graph import IRGraph
from sagellm_ir.located_yaml import yaml_value
from sagellm_ir.lowering.lower import lower
from sagellm_ir.lowering.plan import ExecutionPlan
from sagellm_ir.passes.instruments import Instrument
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import Pipeline
from sagellm_ir.presets import load_target
from sagellm_ir.request import ChatPrompt, Request, TextPrompt
from sagellm_ir.requests import Loaded, load_requests
from sagellm_ir.target import ModelSpec, Target

__all__ = [
    "Compilation",
    "choose_pipeline",
    "choose_target",
    "choose_tokenizer",
    "compile_requests",
    "read_requests",
    "start",
]


@frozen
class Compilation:
    """Requests on their way to a plan."""

    requests: tuple[Request, ...]
    graph: IRGraph
    """As built."""
    tokens: Mapping[str, Sequence[int]]

    def plan(self, scheduled: IRGraph) -> ExecutionPlan:
        """The plan of this compilation's graph after its passes."""
        sampling = {item.id: item.sampling for item in self.requests}
        with shared.working("lowering"):
            return lower(scheduled, self.tokens, sampling)

    def run_passes(self, pipeline: Pipeline, *watching: Instrument, until: str = "") -> IRGraph:
        """The graph after the passes of a pipeline, or after those before the pass `until`."""
        passes = pipeline.before(until) if until else pipeline
        with shared.working(f"running {passes}"):
            return PassManager(passes, watching).run(self.graph)


def start(
    sources: Sequence[str] | None,
    target: str,
    overrides: Sequence[str] | None,
    tokenizer: str,
    skip_bad: bool,
    limit: int | None,
    max_new: int,
) -> Compilation:
    """Load requests, tokenise them and build their graph.

    Raises:
        SageIRError: no source, or something is wrong with one of them or with the target.
    """
    loaded = read_requests(sources, skip_bad, limit, max_new)
    return compile_requests(loaded, choose_target(target, overrides), tokenizer)


def read_requests(
    sources: Sequence[str] | None, skip_bad: bool, limit: int | None, max_new: int
) -> Loaded:
    """Load requests; say on stderr what was odd about them."""
    if not sources:
        raise SageIRError(
            Diagnostic("no requests were given", help="add --request FILE, or `--request -`")
        )
    loaded = load_requests(sources, skip_bad=skip_bad, limit=limit, default_max_new=max_new)
    for finding in loaded.warnings:
        shared.note(str(finding))
    if loaded.skipped:
        count = len(loaded.skipped)
        records = "1 bad record" if count == 1 else f"{count} bad records; the first"
        shared.note(f"skipped {records}: {loaded.skipped[0]}")
    return loaded


def compile_requests(loaded: Loaded, target: Target, tokenizer: str) -> Compilation:
    """Tokenise requests and build their graph."""
    encoder = choose_tokenizer(tokenizer, target, loaded.requests)
    with shared.working(f"building the graph of {len(loaded.requests)} requests"):
        built = build(loaded.requests, target, tokenizer=encoder, locations=loaded.locations)
    return Compilation(loaded.requests, built.graph, built.tokens)


def choose_target(
    name: str, overrides: Sequence[str] | None, model: ModelSpec | None = None
) -> Target:
    """A preset or file, with `key=value` changes, and for another model's shape if one is given."""
    changes: dict[str, Any] = {}
    for text in overrides or ():
        _set(changes, text)
    if model is not None:
        changes["model"] = asdict(model)
    return load_target(name, **changes)


def _set(changes: dict[str, Any], text: str) -> None:
    """Adds what one `--set` says: `a.b=1` is `{"a": {"b": 1}}`."""
    key, equals, value = text.partition("=")
    *outer, last = key.strip().split(".")
    inner: Any = changes
    for part in outer:
        inner = inner.setdefault(part, {}) if isinstance(inner, dict) else None
    try:
        if not equals or not isinstance(inner, dict):
            raise ValueError("expected KEY=VALUE, each KEY once")
        inner[last] = yaml_value(value)
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or error
        help_ = "for example --set max_tokens=512 or --set tiers.device.blocks=100"
        raise SageIRError(Diagnostic(f"--set {text}: {reason}", help=help_)) from None


def choose_pipeline(level: int, text: str | None) -> Pipeline:
    """A pipeline as text, or the preset of an optimisation level."""
    return Pipeline.parse(f"O{level}" if text is None else text)


def choose_tokenizer(name: str, target: Target, requests: Sequence[Request]) -> Tokenizer | None:
    """The tokenizer that `requests` need, if any does."""
    if not any(isinstance(request.prompt, TextPrompt | ChatPrompt) for request in requests):
        return None
    if name == "bytes":
        return ByteTokenizer()
    wanted = target.model.name if name == "auto" else name
    try:
        from sagellm_ir.runtime.engines.embedded import load_tokenizer

        return load_tokenizer(wanted)
    except (ImportError, SageIRError) as error:
        if name != "auto":
            raise
        reason = error.diagnostics[0].message if isinstance(error, SageIRError) else error
        shared.note(f"no tokenizer of {wanted}, so a token is a byte of UTF-8 ({reason})")
        return ByteTokenizer()
