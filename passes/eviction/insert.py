"""Putting steps into a schedule."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate

from attrs import define, field

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import AllReduce, Decode, IRNode, Origin
from sagellm_ir.passes.eviction.live import Live
from sagellm_ir.passes.eviction.steps import StepFacts
from sagellm_ir.passes.rewrite import Names
from sagellm_ir.passes.scheduling.apply import at_step

__all__ = ["Extra", "insert"]


@define
class Extra:
    """A step to put in. It has one forward if it computes anything."""

    nodes: list[IRNode] = field(factory=list)
    rows: int = 0
    """Tokens that it computes."""
    requests: set[str] = field(factory=set)
    """Whose."""


def insert(
    live: Live,
    steps: StepFacts,
    out: Sequence[list[IRNode]],
    extra: Mapping[int, list[Extra]],
    cuts: Mapping[int, list[int]],
    names: Names,
) -> IRGraph:
    """The graph with extra steps.

    Args:
        live: the graph before.
        steps: its steps.
        out: the nodes of each step.
        extra: steps to put in, by the step they come before.
        cuts: by decode, the steps before which it rests for extra steps. It becomes a chain of
            decodes, the last of which keeps its name.
        names: for the new decodes.
    """
    before = accumulate(len(extra.get(step, ())) for step in range(len(out)))
    new = [step + more for step, more in enumerate(before)]
    weaver = _Weaver(live, steps, new, names)
    weaver.cuts = {live.graph.nodes[decode].name: (decode, at) for decode, at in cuts.items()}
    nodes: list[IRNode] = []
    loops: list[int] = []
    for step, here in enumerate(out):
        for item in extra.get(step, ()):
            nodes += [at_step(node, len(loops)) for node in item.nodes]
            loops.append(int(item.rows > 0))
        loops.append(live.graph.loops[step])
        nodes += weaver.resumed.pop(new[step], ())
        nodes += [weaver.moved(node) for node in here]
    return live.graph.replace(nodes=tuple(nodes), loops=tuple(loops))


class _Weaver:
    """Gives nodes their new steps, and cuts decodes where they rest."""

    def __init__(self, live: Live, steps: StepFacts, new: list[int], names: Names) -> None:
        self.live = live
        self.steps = steps
        self.new = new
        self.names = names
        self.cuts: dict[str, tuple[int, list[int]]] = {}
        self.resumed: dict[int, list[IRNode]] = defaultdict(list)
        """By new step: decodes that go on in it, and their collectives."""
        self.parts: dict[str, list[Decode]] = {}

    def moved(self, node: IRNode) -> IRNode:
        """What stands for a node in its own step."""
        assert node.step is not None, "the stage is scheduled"
        step = self.new[node.step]
        if isinstance(node, Decode):
            if node.name in self.cuts:
                return self._cut(node)
            assert node.until is not None, "the stage is scheduled"
            return at_step(node, step, self.new[node.until])
        if isinstance(node, AllReduce) and self.parts:
            node = self._follow(node, step)
        return node if node.step == step else at_step(node, step)

    def _cut(self, node: Decode) -> IRNode:
        """The decode up to its first rest; the other parts wait in `resumed`."""
        decode, at = self.cuts[node.name]
        worker, graph = self.live.worker[decode], self.live.graph
        prompt = graph.request[node.request].prompt_len
        first = self.live.step[decode]
        parts: list[Decode] = []
        origin = Origin("evict", (node.name,))
        operands, after, start, step = node.operands, node.after, node.start, first
        for number, rest in enumerate([*at, -1]):
            last = rest < 0
            done = node.stop - node.start if last else self.steps.forwards(first, rest, worker)
            stop = node.stop if last else node.start + (node.start == prompt) + done
            until = self.live.end[decode] if last else self.steps.before(rest, worker)
            part = Decode(
                node.name if last else self.names.fresh(f"{node.name}.{number}"),
                node.request,
                start,
                stop,
                operands=operands,
                after=after,
                step=self.new[step],
                until=self.new[until],
                worker=node.worker,
                loc=node.loc,
                origin=node.origin if last else origin,
            )
            parts.append(part)
            if number:
                self.resumed[self.new[step]].append(part)
            operands, after, start, step = (part.name,), (), stop, rest
        self.parts[node.name] = parts
        return parts[0]

    def _follow(self, node: AllReduce, step: int) -> AllReduce:
        """The collective, over the parts of its operands that run in its step. Parts of an operand
        that it has alone get one each."""
        operands = []
        for name in node.operands:
            parts = self.parts.get(name, ())
            running = [part.name for part in parts if _runs(part, step)]
            operands += running or [name]
        if len(node.operands) == 1:
            for part in self.parts.get(node.operands[0], ())[1:]:
                assert part.step is not None, "it was set just before"
                name = self.names.fresh(f"{node.name}.0")
                one = node.replace(name=name, operands=(part.name,), step=part.step)
                self.resumed[part.step].append(one)
        return node.replace(operands=tuple(operands))


def _runs(part: Decode, step: int) -> bool:
    assert part.step is not None, "it was set just before"
    assert part.until is not None, "it was set just before"
    return part.step <= step <= part.until
