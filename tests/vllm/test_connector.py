"""What the connector copies between tiers, whatever order the device keeps a block's numbers in."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sagellm_ir.runtime.engines.vllm.connector import PlanConnector
from sagellm_ir.runtime.engines.vllm.copier import Copy
from sagellm_ir.target import DEVICE, HOST
from tests.vllm.late_streams import Device


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


def test_many_blocks_are_staged_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between tiers, and on the way between two that are not the device."""
    monkeypatch.setattr("sagellm_ir.runtime.engines.vllm.copier.STAGED", 1000)  # two blocks
    device = layers(9)
    before = [layer.clone() for layer in device]
    made = connector(device, 9)
    there, shifted = Copy(DEVICE, HOST, range(9), range(9)), Copy(HOST, HOST, range(8), range(1, 9))
    back = Copy(HOST, DEVICE, range(9), range(9))
    made._get_connector_metadata = lambda: SimpleNamespace(copies=(there, shifted, back))
    made.start_load_kv(None)
    for layer, old in zip(device, before, strict=True):
        assert torch.equal(layer[1:], old[:8])
        assert torch.equal(layer[0], old[0])


def test_layers_of_several_types() -> None:
    device = [torch.rand(5, 3, 8), torch.randint(0, 99, (5, 4), dtype=torch.uint8)]
    before = [layer.clone() for layer in device]
    made = connector(device, 2)
    copies = Copy(DEVICE, HOST, (4, 2), (0, 1)), Copy(HOST, DEVICE, (0, 1), (0, 1))
    made._get_connector_metadata = lambda: SimpleNamespace(copies=copies)
    made.start_load_kv(None)
    for layer, old in zip(device, before, strict=True):
        assert torch.equal(layer, old[[4, 2, 2, 3, 4]])


@pytest.mark.parametrize("seed", range(60))
def test_streams_may_run_as_late_as_events_let_them(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random copies between forwards that write blocks: all as if each was done at once."""
    rng = random.Random(seed)
    late = Device()
    monkeypatch.setattr("sagellm_ir.runtime.engines.vllm.copier.STAGED", 1000)  # two blocks
    monkeypatch.setattr(torch, "get_device_module", lambda device: late)
    device = layers(12)
    made = connector(device, 9)
    expected = {DEVICE: [[layer[at].clone() for layer in device] for at in range(12)]}
    expected[HOST] = [[torch.zeros_like(part) for part in expected[DEVICE][0]] for _ in range(9)]
    for number in range(8):
        copies = []
        for _ in range(rng.randrange(4)):
            src, dst = rng.choice([(DEVICE, HOST), (HOST, DEVICE), (DEVICE, DEVICE), (HOST, HOST)])
            count = rng.randrange(1, 8)
            copy = Copy(
                src,
                dst,
                rng.sample(range(len(expected[src])), count),
                rng.sample(range(len(expected[dst])), count),
            )
            copies.append(copy)
            read = [expected[src][at] for at in copy.src]
            for at, content in zip(copy.dst, read, strict=True):
                expected[dst][at] = content
        made._get_connector_metadata = lambda copies=copies: SimpleNamespace(copies=copies)
        made.start_load_kv(None)
        block = rng.randrange(12)
        with late.stream(late.current_stream()):  # the forward
            for layer in device:
                layer[block].fill_(number)
        expected[DEVICE][block] = [
            torch.full_like(part, number) for part in expected[DEVICE][block]
        ]
    late.run(rng)
    for at, content in enumerate(expected[DEVICE]):
        for layer, part in zip(device, content, strict=True):
            assert torch.equal(layer[at], part)
