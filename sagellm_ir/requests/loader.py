"""`load_requests`: sources of any known format -> `Request`s with ids, on one clock."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count, islice
from typing import Any

from attrs import evolve, field, frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.nodes import Location
from sagellm_ir.request import Request
from sagellm_ir.requests.formats import Draft, TraceIds, drafts
from sagellm_ir.requests.known import HARMLESS, OWN, UNSUPPORTED, has_effect
from sagellm_ir.requests.source import DEFAULT_LIMITS, Limits, Record, Source, records

__all__ = ["Loaded", "load_requests"]

_MOST_ERRORS = 20


@frozen
class Loaded:
    """What was read."""

    requests: tuple[Request, ...] = ()
    skipped: tuple[Diagnostic, ...] = ()
    """One for each bad record that `skip_bad` left out."""
    warnings: tuple[Diagnostic, ...] = ()
    locations: Mapping[str, Location] = field(factory=dict)
    """Where each request was written, by id."""


def load_requests(
    sources: Sequence[Source],
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    default_max_new: int = 128,
    limits: Limits = DEFAULT_LIMITS,
) -> Loaded:
    """Reads requests from files, `-` (stdin) or open text streams.

    Requests stay in the order they are written in. One without an id is called after its
    position (`r0`, `r1`, ...); `n` answers become `id`, `id#1`, ... A `timestamp` is counted from
    the earliest one of its source; an `arrival` is taken as it is. Block ids of different sources
    are unrelated.

    Args:
        sources: read one after the other.
        skip_bad: leave bad records out, and count them in `skipped`.
        limit: stop after this many requests.
        default_max_new: tokens to generate where a record does not say.
        limits: how much untrusted input is read.

    Raises:
        SageIRError: a source cannot be read or, without `skip_bad`, records are bad: up to 20
            diagnostics, each with file, line, field and what was expected.
    """
    return _Loading(skip_bad, limit, default_max_new).run(sources, limits)


class _Loading:
    """The state of one `load_requests`."""

    def __init__(self, skip_bad: bool, limit: int | None, default_max_new: int) -> None:
        self.skip_bad = skip_bad
        self.limit = limit
        self.default_max_new = default_max_new
        self.drafts: list[tuple[int, Draft]] = []
        self.bad: list[Diagnostic] = []
        self.warnings: list[Diagnostic] = []
        self.position = self.count = 0
        self.trace_ids = TraceIds()

    def run(self, sources: Sequence[Source], limits: Limits) -> Loaded:
        if isinstance(sources, str):
            raise TypeError("sources is a list of sources, not one string")
        for source in sources:
            if not self.full:
                self.read(source, limits)
        if not self.drafts and not self.bad and not self.full:
            names = ", ".join(map(str, sources)) or "no sources"
            self.warnings.append(Diagnostic(f"no requests in {names}", severity="warning"))
        requests, locations = self.finish()
        if self.bad and not self.skip_bad:
            stopped = Diagnostic(
                f"stopped reading after {_MOST_ERRORS} errors",
                help="--skip-bad counts bad records and goes on",
            )
            rest = [stopped] if len(self.bad) >= _MOST_ERRORS else []
            raise SageIRError(*self.bad[:_MOST_ERRORS], *rest)
        return Loaded(tuple(requests), tuple(self.bad), tuple(self.warnings), locations)

    @property
    def full(self) -> bool:
        return self.limit is not None and self.count >= self.limit

    def read(self, source: Source, limits: Limits) -> None:
        """Appends the drafts of one source, and puts them on its clock."""
        begin, warned = len(self.drafts), set[str]()
        self.trace_ids.new_scope()
        for record in records(source, limits):
            self.record(record, warned)
            if self.full or (not self.skip_bad and len(self.bad) >= _MOST_ERRORS):
                break
        _rebase([draft for _, draft in self.drafts[begin:]])

    def record(self, record: Record | Diagnostic, warned: set[str]) -> None:
        """Appends the drafts of one record, or what is wrong with it."""
        position, self.position = self.position, self.position + 1
        if isinstance(record, Diagnostic):
            self.bad.append(record)
            return
        try:
            made = drafts(record, self.trace_ids)
        except SageIRError as error:
            self.bad.extend(error.diagnostics)
            return
        for draft in made:
            self.drafts.append((position, draft))
            self.count += draft.copies * len(draft.prompts)
        self.warn(made, record.value, warned)

    def warn(self, made: list[Draft], values: Any, warned: set[str]) -> None:
        """Warns about fields that have no effect, once a source."""
        for draft in made[:1]:
            for name in draft.unknown:
                if name in warned or name in HARMLESS:
                    continue
                if name in UNSUPPORTED:
                    value = values.get("body", values).get(name)
                    if not has_effect(name, value):
                        continue
                    message, help_ = f"{name} is not supported and has no effect", ""
                else:
                    message, help_ = f"unknown field {name!r} has no effect", suggest(name, OWN)
                warned.add(name)
                self.warnings.append(Diagnostic(message, draft.loc, "warning", help=help_))

    def finish(self) -> tuple[list[Request], dict[str, Location]]:
        """Names the requests, and leaves out those whose name is taken."""
        taken = {draft.fields["id"] for _, draft in self.drafts}
        requests: list[Request] = []
        locations: dict[str, Location] = {}
        for position, draft in self.drafts:
            if draft.fields["id"] is None:
                draft.fields["id"] = _free(f"r{position}", taken)
            draft.fields.setdefault("max_new_tokens", self.default_max_new)
            for request in islice(_expanded(draft), self.room(len(requests))):
                if (first := locations.get(request.id)) is not None:
                    message = f"id: {request.id!r} is taken"
                    note = f"first used at {first}"
                    help_ = "give each request its own id"
                    self.bad.append(Diagnostic(message, draft.loc, notes=(note,), help=help_))
                    continue
                locations[request.id] = draft.loc
                requests.append(request)
        return requests, locations

    def room(self, made: int) -> int | None:
        """How many more requests are wanted; None: any number."""
        return None if self.limit is None else max(0, self.limit - made)


def _rebase(made: list[Draft]) -> None:
    """Turns the stamps of one source into arrivals: seconds since its earliest one."""
    start = min((draft.stamp for draft in made if draft.stamp is not None), default=0)
    for draft in made:
        if draft.stamp is not None:
            draft.fields["arrival"] = (draft.stamp - start) / 1e9


def _free(base: str, taken: set[str]) -> str:
    """`base`, or the first of `base.1`, `base.2`, ... that no record uses."""
    names = chain([base], (f"{base}.{number}" for number in count(1)))
    return next(name for name in names if name not in taken)


def _expanded(draft: Draft) -> Iterator[Request]:
    """The requests of one draft: `id`, `id#1`, ...; seeds count up, so that answers differ."""
    fields = draft.fields
    first = Request(**fields, prompt=draft.prompts[0])
    yield first
    for number in range(1, len(draft.prompts) * draft.copies):
        prompt = draft.prompts[number // draft.copies]
        sampling = first.sampling
        if sampling.seed is not None:
            sampling = evolve(sampling, seed=sampling.seed + number)
        yield evolve(first, id=f"{first.id}#{number}", prompt=prompt, sampling=sampling)
