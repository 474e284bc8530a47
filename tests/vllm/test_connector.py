"""What the connector copies between tiers, whatever order the device keeps a block's numbers in."""

import random
from types import SimpleNamespace
from typing import Any

import torch

from sagellm_ir.runtime.engines.vllm.connector import Copy, PlanConnector
from sagellm_ir.target import DEVICE, HOST


def connector(layers: list[torch.Tensor], host: int) -> Any:
    """A connector beside these KV tensors, without an engine."""
    made: Any = object.__new__(PlanConnector)
    made._kv_cache_config = SimpleNamespace(num_blocks=len(layers[0]))
    made._kv_transfer_config = SimpleNamespace(
        get_from_extra_config=lambda name, default: {HOST: host}
    )
    made.register_kv_caches({f"layer{at}": layer for at, layer in enumerate(layers)})
    return made


def layers(blocks: int) -> list[torch.Tensor]:
    """Two layers, heads inside tokens in memory: (blocks, heads, tokens, width) from outside."""
    return [torch.rand(blocks, 4, 2, 6).permute(0, 2, 1, 3) for _ in range(2)]


def test_blocks_come_back_as_they_went() -> None:
    rng = random.Random(0)
    for _ in range(20):
        device = layers(12)
        before = [layer.clone() for layer in device]
        made = connector(device, 9)
        count = rng.randrange(1, 7)
        start = rng.randrange(12 - count)
        scattered = rng.sample(range(12), count)
        src = rng.choice((scattered, range(start, start + count)))
        stored, back = rng.sample(range(9), count), rng.sample(range(12), count)
        copies = Copy(DEVICE, HOST, src, stored), Copy(HOST, DEVICE, stored, back)
        made._get_connector_metadata = lambda copies=copies: SimpleNamespace(copies=copies)
        made.start_load_kv(None)
        for layer, old in zip(device, before, strict=True):
            expected = old.clone()
            expected[back] = old[list(src)]
            assert torch.equal(layer, expected)


def test_within_a_tier_all_is_read_before_it_is_written() -> None:
    device = layers(4)
    before = [layer.clone() for layer in device]
    made = connector(device, 1)
    moved = Copy(DEVICE, DEVICE, (0, 1, 2), (1, 2, 3))
    made._get_connector_metadata = lambda: SimpleNamespace(copies=(moved,))
    made.start_load_kv(None)
    for layer, old in zip(device, before, strict=True):
        assert torch.equal(layer[1:], old[:3])


def test_a_block_lies_in_the_host_as_on_the_device() -> None:
    made = connector(layers(3), 5)
    host, device = made._tiers[HOST][0], made._tiers[DEVICE][0]
    assert host.shape[1:] == device.shape[1:]
    assert host.stride()[2:] == device.stride()[2:]
