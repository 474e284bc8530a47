"""The model agent of patch 0003: forwards behind forwards whose last tokens the host has not seen."""

import asyncio
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from lmdeploy.pytorch.config import DistConfig
from lmdeploy.pytorch.engine import model_agent as module
from lmdeploy.pytorch.engine.model_agent import BaseModelAgent
from lmdeploy.pytorch.messages import SamplingParam, UpdateTokenMode
from lmdeploy.pytorch.model_inputs import ModelInputs
from lmdeploy.pytorch.strategies.ar.model_agent import ARModelAgentStrategy
from lmdeploy.pytorch.strategies.ar.sampling import ARSamplingStrategy

from tests.lmdeploy.cpu import scheduler

VOCAB = 50


class Agent(BaseModelAgent):  # type: ignore[misc]
    """LMDeploy's, over a model of one table: the logits depend on the newest token and its place."""

    def __init__(self) -> None:
        self.agent_strategy = ARModelAgentStrategy()
        self.spec_agent = types.SimpleNamespace(
            async_model_forward=self._same, is_enabled=lambda: False
        )
        self.rank, self.need_output, self.cache_engine = 0, True, None
        self.misc_config = types.SimpleNamespace(logprobs_mode=None)
        self.guided_decoding_manager = None
        self.table = torch.randn(97, VOCAB, generator=torch.Generator().manual_seed(0))
        self.tokens: list[Any] = []
        self.stopped: list[Any] = []

    @staticmethod
    async def _same(_: Any, __: Any, extra: Any, ___: Any) -> Any:
        return extra

    async def _async_model_forward(self, inputs: Any, **_: Any) -> dict[str, Any]:
        at = (inputs.input_ids[0] * 31 + inputs.history_lengths * 17) % 97
        return {"logits": self.table[at].clone()[None], "seq_length": inputs.seq_length}

    def _push_output(self, output: Any) -> None:
        self.tokens.append(output.next_token_ids.clone())
        self.stopped.append(output.stopped.clone())


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    context = types.SimpleNamespace(dist_config=DistConfig())
    manager = types.SimpleNamespace(current_context=lambda: context)
    monkeypatch.setattr(module, "get_dist_manager", lambda: manager)


def sequences(params: Sequence[dict[str, Any]]) -> list[Any]:
    """Sequences whose prompts have been computed, with the first token of each answer."""
    sched = scheduler()
    found = []
    for number, param in enumerate(params):
        base = {"max_new_tokens": 9, "top_k": 1, "ignore_eos": True, "stop_words": []}
        seq = sched.add_session(number).add_sequence(
            np.arange(4 + number), sampling_param=SamplingParam(**{**base, **param})
        )
        seq.update_token_ids(np.array([7 + number]), mode=UpdateTokenMode.PREFILL)
        found.append(seq)
    return found


def forwards(agent: Agent, seqs: Sequence[Any], loops: int, follows: Any = None) -> None:
    """One decision: the inputs are made of what the host knows."""
    old = torch.tensor([seq.num_history_ids for seq in seqs])
    ones = torch.ones(len(seqs), dtype=torch.long)
    inputs = ModelInputs(
        input_ids=torch.tensor([seq.token_ids[0] for seq in seqs])[None],
        seq_length=ones,
        history_lengths=old,
        block_offsets=torch.zeros(len(seqs), 1, dtype=torch.int32),
        is_decoding=True,
        num_ignored_history=torch.zeros_like(ones),
        max_q_seqlen=1,
        max_kv_seqlen=int(old.max()) + 1,
        sum_kv_seqlen=int(old.sum()) + len(seqs),
        model_metas=[None] * len(seqs),
    )
    strategy = agent.agent_strategy
    step = agent._async_step_background(
        inputs,
        loops,
        sampling_inputs=ARSamplingStrategy(0).make_sampling_inputs(seqs),
        stopping_criteria=strategy.make_stopping_criteria(seqs),
        extra_inputs=strategy.make_extra_inputs(seqs),
        follows=follows,
    )
    asyncio.run(step)


def take_in(agent: Agent, seqs: Sequence[Any], outputs: int) -> None:
    for tokens in agent.tokens[:outputs]:
        for seq, token in zip(seqs, tokens.tolist(), strict=True):
            seq.update_token_ids(np.array([token]), mode=UpdateTokenMode.DECODE)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1]])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"repetition_penalty": 1.7},
        {"stop_words": [11, 12, 13, 14, 15, 16, 17, 18], "ignore_eos": False, "min_new_tokens": 6},
        {"max_new_tokens": 7},
    ],
)
def test_forwards_behind_forwards_are_those_of_one_step(
    rows: list[int], params: dict[str, Any]
) -> None:
    """Three and three are as six, with the host one token behind; of all rows, and of some in another order."""
    whole = Agent()
    forwards(whole, sequences([params] * 3), 6)
    parts, seqs = Agent(), sequences([params] * 3)
    forwards(parts, seqs, 3)
    take_in(parts, seqs, 2)
    forwards(parts, [seqs[row] for row in rows], 3, torch.tensor(rows))
    for one, other in zip(whole.tokens[3:], parts.tokens[3:], strict=True):
        assert one[rows].tolist() == other.tolist()
    for one, other in zip(whole.stopped[3:], parts.stopped[3:], strict=True):
        assert one[rows].tolist() == other.tolist()
    assert len({tuple(tokens.tolist()) for tokens in whole.tokens}) > 2
