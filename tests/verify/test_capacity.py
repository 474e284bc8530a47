"""The law of capacity: live blocks fit every tier, and life ends with the last use."""

import pytest

from sagellm_ir.text import parse_graph
from sagellm_ir.verify import VerifyError, check_capacity, verify

GRAPH = """sagellm_ir 1
graph @g {{stage = scheduled}} {{
  tier @device {{blocks = {device}}}
  tier @host {{blocks = {host}}}
  cache @device {{blocks = [0:2]}}
  cache @host {{blocks = [5]}}
  request @a {{prompt = 40, blocks = [0, 1], max_new = 9}}
  request @b {{prompt = 40, blocks = [0, 1], max_new = 1}}
  request @c {{prompt = 17, blocks = [5], max_new = 1}}
  %hit = kv_fetch @a[0:32] {{from = device, step = 0}} : kv<32>
  %again = kv_fetch @b[0:16] {{from = device, step = 0}} : kv<16>
  %a = prefill @a[32:40](%hit) {{step = 0}} : kv<40>
  %b = prefill @b[16:40](%again) {{step = 0}} : kv<40>
  %bd = decode @b[40:41](%b) {{step = 0, until = 0}} : kv<41>
  %ad = decode @a[40:49](%a) {{step = 1, until = 1}} : kv<49>
  %c0 = kv_fetch @c[0:16] {{step = 2}} : kv<16>
  %c1 = prefill @c[16:17](%c0) {{step = 2}} : kv<17>
  %cd = decode @c[17:18](%c1) {{step = 2, until = 2}} : kv<18>
  steps [1, 8, 1]
}}
"""


def check(device: int, host: int) -> None:
    graph = parse_graph(GRAPH.format(device=device, host=host))
    verify(graph)
    check_capacity(graph)


def test_what_fits() -> None:
    # Step 0: blocks 0 and 1 once, though two values pin block 0; one more for %a, two for %b.
    check(5, 1)


def test_device_overflows() -> None:
    message = "tier 'device' of worker 'w0' has 4 blocks, but step 0 needs 5"
    with pytest.raises(VerifyError, match=message):
        check(4, 1)


def test_cached_blocks_on_the_host_live_until_fetched() -> None:
    with pytest.raises(VerifyError, match="tier 'host' of worker 'w0' has 0 blocks, but step 0"):
        check(5, 0)


def test_needs_a_schedule() -> None:
    with pytest.raises(VerifyError, match="capacity is known of scheduled graphs only"):
        check_capacity(parse_graph("sagellm_ir 1\ngraph @g {}"))
