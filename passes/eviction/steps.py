"""The steps of a scheduled graph: whose they are, and what room they have left."""

from itertools import accumulate

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import Decode, Prefill
from sagellm_ir.verify.schedule import step_workers

__all__ = ["StepFacts"]


class StepFacts:
    """Facts about steps; workers are indexes."""

    def __init__(self, graph: IRGraph) -> None:
        count, workers = len(graph.loops), graph.target.workers
        self._single = len(workers) == 1
        self.owner = [0] * count if self._single else step_workers(graph.columns).tolist()
        self._before: list[list[int]] = []
        self._forwards: list[list[int]] = []
        for worker in range(len(workers)):
            mine = [step if self.owner[step] == worker else -1 for step in range(count)]
            self._before.append(list(accumulate(mine, max, initial=-1)))
            loops = [
                forwards if owner == worker else 0
                for forwards, owner in zip(graph.decode_loops, self.owner, strict=True)
            ]
            self._forwards.append(list(accumulate(loops, initial=0)))
        self.spare = self._spare(graph)
        """Rows each step could still compute, if it has a prefill already."""

    def _spare(self, graph: IRGraph) -> list[int]:
        changes = [0] * (len(graph.loops) + 1)
        for node in graph.nodes:
            if isinstance(node, Prefill) and node.step is not None:
                changes[node.step] += node.stop - node.start
                changes[node.step + 1] -= node.stop - node.start
            elif not graph.target.mixed:
                continue  # decodes rest beside prefills
            elif isinstance(node, Decode) and node.step is not None and node.until is not None:
                changes[node.step] += 1
                changes[node.until + 1] -= 1
        return [graph.target.max_tokens - rows for rows in accumulate(changes[:-1])]

    def before(self, step: int, worker: int) -> int:
        """The worker's last step before `step`; -1: there is none."""
        return self._before[worker][step]

    def forwards(self, first: int, step: int, worker: int) -> int:
        """Forwards of the worker's steps from `first` up to, but without, `step`."""
        return self._forwards[worker][step] - self._forwards[worker][first]
