"""The text form of an `IRGraph`: `parse_graph(print_graph(graph)) == graph`."""

from sagellm_ir.text.parser import parse_graph
from sagellm_ir.text.printer import print_graph
from sagellm_ir.text.syntax import TEXT_VERSION

__all__ = ["TEXT_VERSION", "parse_graph", "print_graph"]
