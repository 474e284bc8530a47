"""KV goes to another worker: what arrives is what was sent, and references stay intact."""

import json
from pathlib import Path

from tests.lmdeploy import trees


def test_a_prefix_goes_to_another_worker(tmp_path: Path) -> None:
    ranks = [
        trees.on_patched("tests.lmdeploy.two_workers", str(rank), str(tmp_path / "meeting"))
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    source, target = (json.loads(out.splitlines()[-1]) for out, _ in said)
    assert source["sent"] == target["came"] == [3, 0]  # the first block was there, then all were
    assert source["unknown"] == target["unknown"] == 0
    assert source["kept"]
    assert target["taken"] == 3
    assert target["shared"]
    # The target's own first block, then the source's.
    for there, here in zip(source["content"], target["content"], strict=True):
        assert here[1:] == there[1:]
        assert here[0] != there[0]
    assert target["references"] == [3, 2, 2, 2]  # the trie and each sequence
    assert target["room"]
