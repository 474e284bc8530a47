"""`SymbolicWorker`: a vLLM worker without a model, which knows what every KV slot holds.

It keeps the state that vLLM's own worker keeps from one `SchedulerOutput` to the next, and runs
forwards on symbols: the KV of a token is a hash of all tokens up to it. A row that reads a slot
which holds anything else fails. Its next token is a function of that hash, so answers can be
checked too.
"""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

import torch
from attrs import define

from sagellm_ir.runtime.accel import AttentionSpec
from sagellm_ir.runtime.accel.forest import plan_forest
from sagellm_ir.runtime.engines.vllm.attention import KernelBatches
from sagellm_ir.target import DEVICE

__all__ = ["VOCABULARY", "SymbolicWorker", "answer"]

VOCABULARY = 50
Slot = tuple[str, int, int]
"""Tier, block, offset."""


class Text:
    """Tokens, and the KV of each: a hash of all tokens up to it."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self.kv: list[bytes] = []
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """One more token."""
        before = self.kv[-1] if self.kv else b""
        self.tokens.append(token)
        self.kv.append(blake2b(before + bytes([token]), digest_size=8).digest())

    def go_on(self) -> int:
        """Add the token that the model says next."""
        self.add(int.from_bytes(self.kv[-1], "big") % VOCABULARY)
        return self.tokens[-1]


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """Plain greedy decoding."""
    text = Text(prompt)
    return [text.go_on() for _ in range(count)]


@define
class _State:
    text: Text
    prompt: int
    blocks: list[int]
    computed: int


class CheckedKernels:
    """Stands in for `PrefixAttention`: what a batch is said to share is shared."""

    gate = None
    max_batch = 64
    variant = SimpleNamespace(shared=16)

    def __init__(self, block_size: int) -> None:
        self.spec = AttentionSpec(4, 2, 16, block_size)
        self.tables: list[list[int]] = []
        """Of the rows of the batch to come."""
        self.seen: list[tuple[int, int]] = []
        """Of each group: its length, and its rows."""

    def update(self, new: Any, total: Any, groups: Any, *, tile: int) -> None:
        """See `PrefixAttention.update`."""
        assert len(new) == len(total) <= len(self.tables)
        assert all(count == 1 for count in new)
        plan_forest(self.spec, groups, new, total, None)  # raises
        for group in groups:
            span = slice(group.start // self.spec.block_size, group.stop // self.spec.block_size)
            tables = [self.tables[row][span] for row in group.rows]
            assert all(table == tables[0] for table in tables)
            self.seen.append((group.stop - group.start, len(tables)))


class SymbolicWorker:
    """One worker; `run` is a forward.

    An asynchronous one keeps the tokens that it sampled on its device, of the last forward alone. Those
    of other answers it must be told, and of a row that it computes again.
    """

    def __init__(self, block_size: int, asynchronous: bool = False) -> None:
        self.block_size = block_size
        self.asynchronous = asynchronous
        self._before: set[str] = set()
        """Requests in the forward before."""
        self.states: dict[str, _State] = {}
        self.memory: dict[Slot, bytes] = {}
        self.common: list[int] = []
        """Of each forward, the leading blocks that all its rows share."""
        self.kernels = CheckedKernels(block_size)
        self._places: dict[str, int] = {}
        self._batches = KernelBatches(self.kernels, "first", (), lambda: self._places)  # type: ignore[arg-type]

    def run(self, out: Any) -> Any:
        """Carry out a `SchedulerOutput`; what vLLM calls a `ModelRunnerOutput`."""
        for name in out.finished_req_ids:
            self.states.pop(name, None)
        for new in out.scheduled_new_reqs:
            assert new.req_id not in self.states, "the worker knows it"
            (blocks,) = new.block_ids
            self.states[new.req_id] = _State(
                Text(new.prompt_token_ids),
                len(new.prompt_token_ids),
                list(blocks),
                new.num_computed_tokens,
            )
        self._go_on(out.scheduled_cached_reqs, out.num_scheduled_tokens)
        self._copy(out.kv_connector_metadata.copies)
        rows = out.num_scheduled_tokens
        self._check_common(out.num_common_prefix_blocks[0], rows)
        assert out.total_num_scheduled_tokens == sum(rows.values())
        if rows:
            self._tell(out.kv_connector_metadata.groups, rows)
        for name, count in rows.items():  # all rows write before any reads, as each layer does
            self._write(self.states[name], count)
        sampled = [self._read(self.states[name], count) for name, count in rows.items()]
        self._before = set(rows)
        return SimpleNamespace(
            sampled_token_ids=sampled,
            req_id_to_index={name: at for at, name in enumerate(rows)},
            logprobs=None,
            prompt_logprobs_dict={},
        )

    def _go_on(self, cached: Any, counts: Mapping[str, int]) -> None:
        for at, name in enumerate(cached.req_ids):
            state = self.states[name]
            state.computed = cached.num_computed_tokens[at]
            blocks = cached.new_block_ids[at]
            tokens, anew = state.text.tokens, name in cached.resumed_req_ids
            assert cached.num_output_tokens[at] == len(tokens) - state.prompt
            if self.asynchronous and len(tokens) > state.prompt:
                if anew or name not in self._before:
                    assert cached.all_token_ids[name] == tokens, "tokens that it was not told"
                else:
                    stop = state.computed + counts[name]
                    assert stop <= state.prompt or counts[name] == 1, "tokens of a row in its batch"
            if anew:
                (state.blocks,) = ([*ids] for ids in blocks)
            elif blocks is not None:
                state.blocks += blocks[0]

    def _copy(self, copies: Any) -> None:
        for copy in copies:
            pairs = [
                ((copy.from_tier, src, offset), (copy.to_tier, dst, offset))
                for src, dst in zip(copy.src, copy.dst, strict=True)
                for offset in range(self.block_size)
            ]
            taken = [(slot, self.memory.get(source)) for source, slot in pairs]
            for slot, value in taken:
                self.memory.pop(slot, None)
                if value is not None:
                    self.memory[slot] = value

    def _check_common(self, common: int, rows: Iterable[str]) -> None:
        """Blocks that all rows are said to share are, and lie behind all of them."""
        tables = [self.states[name].blocks[:common] for name in rows]
        assert all(table == tables[0] and len(table) == common for table in tables)
        assert all(self.states[name].computed >= common * self.block_size for name in rows)
        self.common.append(common)

    def _tell(self, groups: Any, rows: Mapping[str, int]) -> None:
        """Tell the kernels of a forward. In vLLM's batch requests lie in another order, those of one
        token first."""
        order = sorted(rows, key=lambda name: (rows[name] > 1, name[::-1]))
        self._places = {name: at for at, name in enumerate(order)}
        self.kernels.tables = [self.states[name].blocks for name in self._places]
        total = [self.states[name].computed + rows[name] for name in self._places]
        self._batches.groups = groups
        self._batches.step(
            SimpleNamespace(
                num_reqs=len(rows),
                max_query_len=max(rows.values(), default=0),
                query_start_loc_cpu=torch.tensor([0, *(rows[name] for name in order)]).cumsum(0),
                seq_lens_cpu_upper_bound=torch.tensor(total, dtype=torch.int32),
            )
        )

    def _slot(self, state: _State, position: int) -> Slot:
        block = state.blocks[position // self.block_size]
        assert block > 0, "vLLM's null block"
        return DEVICE, block, position % self.block_size

    def _write(self, state: _State, count: int) -> None:
        stop = state.computed + count
        assert stop <= len(state.text.tokens)
        for position in range(state.computed, stop):
            self.memory[self._slot(state, position)] = state.text.kv[position]

    def _read(self, state: _State, count: int) -> list[int]:
        stop = state.computed + count
        for position in range(stop):
            held = self.memory.get(self._slot(state, position))
            assert held == state.text.kv[position], f"wrong KV at {position}"
        return [state.text.go_on()] if stop == len(state.text.tokens) else []
