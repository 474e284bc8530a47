"""Chunks that end inside a block, all the way to a plan."""

import pytest

from sagellm_ir.lowering import lower
from sagellm_ir.lowering.verify_plan import verify_plan
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.passes.pipeline import Pipeline
from sagellm_ir.text import parse_graph
from sagellm_ir.verify import verify


@pytest.mark.parametrize("max_tokens", [1, 5, 8, 15, 16, 24])
@pytest.mark.parametrize("mixed", ["true", "false"])
def test_a_copied_block_is_full(max_tokens: int, mixed: str) -> None:
    graph = parse_graph(f"""sagellm_ir 1

graph @copies {{stage = built}} {{
  target @cpu {{max_tokens = {max_tokens}, mixed = {mixed}}}
  request @r {{prompt = 50, blocks = [0:3], max_new = 4}}
  %a = prefill @r[0:48] : kv<48>
  %m = kv_migrate @r[0:48](%a) {{to = host}} : kv<48>
  %f = kv_fetch @r[0:48](%m) {{from = host}} : kv<48>
  %p = prefill @r[48:50](%f) : kv<50>
  %d = decode @r[50:54](%p) : kv<54>
}}
""")
    scheduled = PassManager(Pipeline.parse("chunk-prefill,schedule")).run(graph)
    verify(scheduled)
    verify_plan(lower(scheduled))
