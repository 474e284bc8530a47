"""Rows of a planned step, admitted to LMDeploy: blocks, chunk lengths.

What is admitted must run: its blocks are in the trie before they are computed, so that rows of the
same forward can share them (a forward writes the KV of all rows before it reads any, layer by layer).
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

from lmdeploy.messages import EventType
from lmdeploy.pytorch.messages import MessageStatus

from sagellm_ir.lowering.plan import PrefillChunk
from sagellm_ir.runtime.engines.lmdeploy.kv_manager import KVManager
from sagellm_ir.runtime.engines.lmdeploy.prefixes import NONE, Prefixes

__all__ = ["Admission", "PartialPrefills"]


class Admission:
    """Admits rows one by one, as long as they fit."""

    def __init__(self, kv: KVManager) -> None:
        self.kv = kv
        self.scheduler = kv.scheduler
        self.prefixes = Prefixes(kv)
        self.partial: set[int] = set()
        """Sequences whose chunk in flight ends before what is known of them."""
        self.ahead: set[int] = set()
        """Sequences whose next chunk was admitted while a chunk is in flight."""
        self.refused: set[int] = set()
        """Sequences that the last call had no room for."""
        self.evicted = False
        """Whether sequences may have lost their blocks since somebody set this to False."""
        self._size: int = kv.trie.block_size
        self._ready = NONE
        """Blocks that the rows of this step may take."""

    def prefill(self, rows: Iterable[tuple[Any, PrefillChunk]]) -> list[Any]:
        """Admit prefill rows in order; those that do not fit are left waiting, as they were.

        The token budget counts what is computed, after the match (B5).
        """
        pairs = list(rows)
        self.refused.clear()
        self._take_blocks([seq for seq, _ in pairs])
        try:
            return self._admit(pairs)
        finally:
            if len(self._ready):
                self.scheduler.block_manager.allocator.free(self._ready)
                self._ready = NONE

    def _take_blocks(self, seqs: Sequence[Any]) -> None:
        """Take blocks for all that rows may have to compute; not when there are too few."""
        manager, size = self.scheduler.block_manager, self._size
        needed = sum([-(-len(seq.history_cache) // size) for seq in seqs])
        needed -= sum([seq.logical_blocks._num_real + self.prefixes.found(seq) for seq in seqs])
        if manager.num_cpu_blocks == 0 and 0 < needed <= manager.get_num_free_gpu_blocks():
            self._ready = manager.allocator.allocate(needed)

    def _admit(self, pairs: Sequence[tuple[Any, PrefillChunk]]) -> list[Any]:
        budget = self.scheduler.cache_config.max_prefill_token_num
        members = {seq.seq_id for seq, _ in pairs}
        admitted: list[Any] = []
        tokens = 0
        for seq, chunk in pairs:
            table, in_flight = seq.logical_blocks, 0
            if seq._status is MessageStatus.LOCKED:
                in_flight = self._go_on(seq)
            before = table._num_real, table.last_shared_node, seq._num_history_ids
            self.prefixes.fetch(seq)
            known, computed = seq.num_all_ids, seq._num_history_ids
            stop = chunk.stop if chunk.stop < known and _can_split(seq) else known
            wanted = stop - computed
            if wanted <= 0 and not in_flight:  # the trie held all of this chunk
                continue
            fits = wanted > 0 and (not admitted or tokens + wanted <= budget)
            seq._num_token_ids = wanted
            if not fits or not self._fits(seq, members):
                seq._num_token_ids = known - computed
                self.kv.undo(seq, *before)  # B4
                self._go_back(seq, in_flight)
                self.refused.add(seq.seq_id)
                continue
            self._run(seq)
            if stop < known:
                self.partial.add(seq.seq_id)
            admitted.append(seq)
            tokens += wanted
        return admitted

    def _go_on(self, seq: Any) -> int:
        """Count a chunk in flight as computed; its tokens."""
        tokens: int = seq._num_token_ids
        self.partial.discard(seq.seq_id)
        self.ahead.add(seq.seq_id)
        seq._num_history_ids += tokens
        seq._num_token_ids = len(seq.history_cache) - seq._num_history_ids
        return tokens

    def _go_back(self, seq: Any, tokens: int) -> None:
        """Count a chunk of some tokens as in flight again; 0: none is."""
        if tokens:
            self.partial.add(seq.seq_id)
            self.ahead.discard(seq.seq_id)
            seq._num_history_ids -= tokens
            seq._num_token_ids = tokens

    def has_room(self, seqs: Sequence[Any], ahead: int) -> bool:
        """Whether blocks for some tokens more of each sequence are free."""
        manager = self.scheduler.block_manager
        needed = [self._blocks(seq, ahead) - seq.logical_blocks._num_real for seq in seqs]
        free = int(manager.get_num_free_gpu_blocks())
        return not manager.num_cpu_blocks and sum(need for need in needed if need > 0) <= free

    def decode(self, seqs: Sequence[Any], loops: int) -> list[Any]:
        """Admit decode rows for `loops` tokens each; those without room keep running, later."""
        self.refused.clear()
        size, short = self._size, seqs
        if self.scheduler.block_manager.num_cpu_blocks == 0:
            short = [
                seq
                for seq in seqs
                if seq._num_history_ids + seq._num_token_ids + loops
                > seq.logical_blocks._num_real * size
            ]
        if short and not self._extend(short, loops):
            members = {seq.seq_id for seq in seqs}
            for seq in short:
                if self._room(seq, loops, members):
                    self.scheduler.block_manager.allocate(seq, loops)
                else:
                    self.refused.add(seq.seq_id)
        return [seq for seq in seqs if seq.seq_id not in self.refused] if self.refused else [*seqs]

    def _extend(self, seqs: Sequence[Any], ahead: int) -> bool:
        """Give all of them at once the blocks of some tokens more; False: that is not so easy."""
        manager = self.scheduler.block_manager
        tables = [seq.logical_blocks for seq in seqs]
        stops = [self._blocks(seq, ahead) for seq in seqs]
        needed = sum(stops) - sum([table._num_real for table in tables])
        if manager.num_cpu_blocks or needed > manager.get_num_free_gpu_blocks():
            return False
        blocks = iter(manager.allocator.allocate(needed).tolist())
        for table, stop in zip(tables, stops, strict=True):
            table.reserve(stop)
            for place in range(table._num_real, stop):  # one, as nearly always
                table._blocks[place] = next(blocks)
            table._num_real = stop
        return True

    def _blocks(self, seq: Any, ahead: int) -> int:
        """The blocks that a sequence has to hold for some tokens more, as LMDeploy counts them."""
        tokens: int = seq._num_history_ids + seq._num_token_ids + ahead
        cross: int = seq._num_history_cross + seq._num_cross
        return -(-max(tokens, cross) // self._size)

    def _fits(self, seq: Any, members: set[int]) -> bool:
        """Give a prefill row its blocks; False: there is no room."""
        manager = self.scheduler.block_manager
        needed = self._blocks(seq, 0) - seq.logical_blocks._num_real
        if 0 < needed <= len(self._ready):  # as nearly always
            seq.logical_blocks.append(self._ready[:needed])
            self._ready = self._ready[needed:]
            return True
        if not self._room(seq, 0, members):
            return False
        manager.allocate(seq, 0)
        return True

    def _run(self, seq: Any) -> None:
        self.prefixes.store(seq)
        if seq.seq_id not in self.ahead:  # it is in flight, until its tokens are taken in
            seq.status = MessageStatus.RUNNING
        seq.record_event(EventType.SCHEDULED)

    def _room(self, seq: Any, ahead: int, members: set[int]) -> bool:
        """Have the sequence's blocks on the device, and free ones for what it will compute.

        Cached prefixes go first, then conversations that ended (newest first, as stock does), then
        sequences that wait and hold blocks, last arrived first; never rows of this step.
        """
        if not self.kv.make_resident(seq):
            return False
        needed = self.scheduler.block_manager.num_required_blocks(seq, ahead)
        if self.kv.make_room(needed):
            return True
        self.evicted = True
        others = chain(reversed(self.scheduler.hanging), reversed(self.scheduler.waiting))
        evictable = [other for other in others if other.seq_id not in members]
        return bool(self.scheduler.eviction_helper.evict_for_seq(seq, evictable, ahead))


def _can_split(seq: Any) -> bool:
    """Whether a prefill may end early: not when its logits, or the token it samples, have an effect."""
    param = seq.sampling_param
    seen = param.response_format or param.out_logits or param.num_logprobs >= 0
    images = len(seq.history_embeddings) > 0 or not seq.history_multimodals.empty()
    return not (seen or seq.return_routed_experts or images)


class PartialPrefills:
    """A sequence strategy that throws away the token a partial prefill samples, and puts the blocks of
    answers that end into the trie, where the next turn of the conversation finds them.

    Wraps the engine's own; everything but `update_running` is the wrapped one's.

    Args:
        inner: the wrapped one.
        admission: knows the partial rows.
        told: called when the tokens of a forward have been taken in.
    """

    def __init__(
        self, inner: Any, admission: Admission, told: Callable[[], None] = lambda: None
    ) -> None:
        self._inner = inner
        self._admission = admission
        self._told = told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def update_running(
        self, running: Sequence[Any], batched_outputs: Any, is_decoding: bool
    ) -> None:
        """Advance partial rows by their chunk and let them wait for the next; the rest as before."""
        partial, ahead = self._admission.partial, self._admission.ahead
        both = partial | ahead
        rows = [] if is_decoding else [seq for seq in running if seq.seq_id in both]
        for seq in rows:
            if seq.status == MessageStatus.LOCKED:  # not any more, so that the wrapped one skips it
                runs_on = seq.seq_id in ahead
                seq.status = MessageStatus.RUNNING if runs_on else MessageStatus.WAITING
        stopped = self._admission.scheduler.seq_manager.get_sequences(MessageStatus.STOPPED)
        before = len(stopped)
        self._inner.update_running(
            running=running, batched_outputs=batched_outputs, is_decoding=is_decoding
        )
        if len(stopped) > before:
            for seq in running:
                if seq._status is MessageStatus.STOPPED:
                    self._admission.kv.store_answer(seq)
        for seq in rows:
            if seq.seq_id in ahead:  # counted when its next chunk was admitted
                ahead.discard(seq.seq_id)
                continue
            partial.discard(seq.seq_id)
            seq._num_history_ids += seq._num_token_ids
            seq._num_token_ids = len(seq.history_cache) - seq._num_history_ids
        self._told()
