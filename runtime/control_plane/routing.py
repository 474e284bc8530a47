"""Which engine of a fleet a request goes to: accelerators asked for first, then the longest cached
prefix, then the least load.

Sending a request to the engine that holds its prefix is grouping by prefix: requests of one
document meet on one engine, also while the first of them still runs. It gives way when that engine
is busier than the others by more than `slack` requests (the rule of cache-aware routers, e.g.
SGLang's: balance when the imbalance passes a threshold).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from attrs import field, frozen

from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.runtime.control_plane.prefixes import PrefixIndex
from sagellm_ir.runtime.protocols import DEVICE_KINDS, DOMESTIC

__all__ = ["ROUTINGS", "Candidate", "Need", "Router", "accelerators"]

ROUTINGS = ("longest_prefix", "least_loaded", "round_robin")
WHOLE_REQUESTS = ("general", "hybrid")
"""Instance types that serve a request from prompt to end; the others serve one phase."""


class Candidate(Protocol):
    """What a router reads of an engine: the Control Plane's `EngineInfo` has it all."""

    @property
    def engine_id(self) -> str:
        """Its name."""
        ...

    @property
    def active_requests(self) -> int:
        """Requests under way there."""
        ...

    @property
    def queue_length(self) -> int:
        """Requests that wait there."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What it told about itself: `engine_metadata`."""
        ...


C = TypeVar("C", bound=Candidate)


@frozen
class Need:
    """What routing looks at in a request."""

    blocks: tuple[bytes, ...] = ()
    """Of its prompt: `prompt_blocks`."""
    prefer: tuple[str, ...] = ()
    """Kinds of devices to take first, if any engine has one."""
    excluded: frozenset[str] = frozenset()
    """Engines that have failed it already."""


def accelerators(words: str | Sequence[str]) -> tuple[str, ...]:
    """Device kinds from a user's word or words; `domestic` is all of `DOMESTIC`.

    Raises:
        SageIRError: a word is no device kind.
    """
    wanted: list[str] = []
    for word in (words,) if isinstance(words, str) else words:
        if word != "domestic" and word not in DEVICE_KINDS:
            known = (*DEVICE_KINDS, "domestic")
            raise SageIRError(
                Diagnostic(f"no accelerator is called {word!r}", help=suggest(word, known))
            )
        wanted += DOMESTIC if word == "domestic" else (word,)
    return tuple(dict.fromkeys(wanted))


@frozen
class Router:
    """Chooses among engines, and remembers what it sent where.

    Attributes:
        routing: one of `ROUTINGS`.
        prefer: device kinds that every request takes first.
        slack: requests by which the engine with the longest prefix may be busier than the least
            busy one.
    """

    routing: str = "longest_prefix"
    prefer: tuple[str, ...] = ()
    slack: int = 8
    index: PrefixIndex = field(factory=PrefixIndex)
    _turns: dict[str, int] = field(factory=dict)
    """When each engine was last chosen."""

    def __attrs_post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise SageIRError(
                Diagnostic(
                    f"no routing is called {self.routing!r}", help=suggest(self.routing, ROUTINGS)
                )
            )

    def choose(self, need: Need, candidates: Sequence[C]) -> tuple[C, str] | None:
        """The engine for a request, and why; None when there is none.

        Args:
            need: of the request.
            candidates: engines that serve its model and accept requests.
        """
        able, why = self._able(need, [c for c in candidates if c.engine_id not in need.excluded])
        if not able:
            return None
        lightest = min(_load(c) for c in able)
        if self.routing == "round_robin":
            best, why = min(able, key=self._turn), [*why, "its turn"]
        else:
            held = {c.engine_id: self._held(need, c, lightest) for c in able}
            best = min(able, key=lambda c: (-held[c.engine_id], _load(c), self._turn(c)))
            blocks = held[best.engine_id]
            why.append(f"holds {blocks} of {len(need.blocks)} blocks" if blocks else "least load")
        self._turns[best.engine_id] = max(self._turns.values(), default=0) + 1
        self.index.add(best.engine_id, need.blocks)
        return best, ", ".join(why)

    def _able(self, need: Need, candidates: list[C]) -> tuple[list[C], list[str]]:
        """Engines of whole requests, and of the preferred devices, when there are any."""
        able = [c for c in candidates if _instance_type(c) in WHOLE_REQUESTS] or candidates
        for device in need.prefer or self.prefer:
            if chosen := [c for c in able if _device(c) == device]:
                return chosen, [f"{device} preferred"]
        return able, []

    def _held(self, need: Need, candidate: C, lightest: int) -> int:
        """Blocks of the prompt that a candidate holds; none when it is too busy to wait for."""
        if self.routing != "longest_prefix" or _load(candidate) > lightest + self.slack:
            return 0
        return self.index.longest(candidate.engine_id, need.blocks)

    def _turn(self, candidate: C) -> tuple[int, str]:
        return self._turns.get(candidate.engine_id, 0), candidate.engine_id


def _load(candidate: Candidate) -> int:
    return candidate.active_requests + candidate.queue_length


def _instance_type(candidate: Candidate) -> str:
    return str(candidate.metadata.get("instance_type", "general"))


def _device(candidate: Candidate) -> str:
    capability = candidate.metadata.get("capability")
    return str(capability.get("device", "")) if isinstance(capability, Mapping) else ""
