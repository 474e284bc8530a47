"""Watching passes: timing, statistics, diffs, dumps and reproducers."""

from sagellm_ir.passes.instruments.base import Instrument, PassRun
from sagellm_ir.passes.instruments.diff import Diff, graph_diff
from sagellm_ir.passes.instruments.dump import Dump
from sagellm_ir.passes.instruments.reproducer import Reproducer, read_reproducer
from sagellm_ir.passes.instruments.statistics import Statistics, op_delta
from sagellm_ir.passes.instruments.timing import Timing

__all__ = [
    "Diff",
    "Dump",
    "Instrument",
    "PassRun",
    "Reproducer",
    "Statistics",
    "Timing",
    "graph_diff",
    "op_delta",
    "read_reproducer",
]
