"""What blocks hold: cached content gives way last used first, held content never."""

from sagellm_ir.lowering.plan import KVFree, KVMove
from sagellm_ir.presets import load_target
from sagellm_ir.runtime.ledger import Ledger, Shelf
from sagellm_ir.target import DEVICE, HOST, Device, Target, Tier


def test_cached_blocks_give_way_least_recently_used_first() -> None:
    shelf = Shelf(4)
    first, second = shelf.take(2), shelf.take(2)
    shelf.write((*first, *second), (10, 11, 20, 21))
    shelf.drop(first)
    shelf.drop(second)
    assert shelf.room == 4
    shelf.hold([shelf.block_of[10]])  # used again
    assert shelf.room == 3
    assert shelf.take(1) == (first[1],)  # of a chain, the far end
    assert shelf.take(1) == (second[1],)
    assert shelf.block_of == {10: first[0], 20: second[0]}
    assert shelf.freed == [first[1], second[1]]


def test_of_equal_content_one_block_is_known() -> None:
    shelf = Shelf(2)
    one, two = shelf.take(2)
    shelf.write((one, two), (7, 7))
    shelf.drop((two,))
    assert (shelf.room, shelf.freed) == (1, [two])
    shelf.drop((one,))
    assert (shelf.room, shelf.idle(7)) == (2, True)
    shelf.forget([7, 8])
    assert shelf.freed == [two, one]


def test_a_block_is_free_when_nobody_holds_it() -> None:
    ledger = Ledger(Target(tiers=(Tier("device", 3), Tier("host", 3))))
    held = ledger["host"].take(2)
    ledger["host"].hold(held)
    ledger["host"].drop(held)
    assert ledger.take_changes() == ()
    ledger["host"].drop(held)
    assert ledger.take_changes() == (KVFree("host", held[::-1]),)
    assert ledger.take_changes() == ()


def test_what_gives_way_is_kept_below() -> None:
    """Copied before its block is used again; found there, and not copied twice."""
    target = load_target("vllm-cpu", tiers={DEVICE: {"blocks": 2}, HOST: {"blocks": 1}})
    ledger = Ledger(target, spill=True)
    device, host = ledger[DEVICE], ledger[HOST]

    def use(content: int) -> None:
        block = device.take(1)
        device.write(block, (content,))
        device.drop(block)

    for content in (7, 8):
        use(content)
    assert ledger.take_changes() == ()
    use(9)
    assert ledger.take_changes() == (
        KVMove(DEVICE, HOST, (0,), (0,)),
        KVFree(DEVICE, (0,)),
    )
    assert host.idle(7)
    use(10)  # 8 takes the place of 7
    assert ledger.take_changes() == (
        KVFree(HOST, (0,)),
        KVMove(DEVICE, HOST, (1,), (0,)),
        KVFree(DEVICE, (1,)),
    )
    assert not host.idle(7)
    assert host.idle(8)


def test_what_is_cheap_to_compute_is_not_kept() -> None:
    slow = {DEVICE: {"blocks": 1}, HOST: {"blocks": 1, "bandwidth": 1.0}}
    ledger = Ledger(load_target("vllm-cpu", tiers=slow), spill=True)
    assert ledger[DEVICE].below is None
    assert Ledger(load_target("vllm-cpu"))[DEVICE].below is None


def test_blocks_are_kept_below_where_computing_them_again_costs_more() -> None:
    """Its arithmetic, or its part of a forward that holds few tokens."""

    def keeps(tokens: int, flops: float, overhead: float) -> bool:
        device = Device(flops=flops, step_overhead=overhead)
        tiers = (Tier(DEVICE, 4), Tier(HOST, 4, bandwidth=1e10))
        return (
            Ledger(Target(max_tokens=tokens, device=device, tiers=tiers), spill=True)[DEVICE].below
            is not None
        )

    assert keeps(tokens=8192, flops=1e9, overhead=0.0)
    assert not keeps(tokens=8192, flops=1e18, overhead=0.0)
    assert not keeps(tokens=1 << 20, flops=1e18, overhead=1e-3)
    assert keeps(tokens=64, flops=1e18, overhead=1.0)
