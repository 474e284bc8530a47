"""The online planner drives the real engine: tokens are those each request gets alone."""

import random

import torch

from sagellm_ir.lowering.plan import PlanRequest
from sagellm_ir.runtime.engines.embedded import EmbeddedEngine, random_model
from sagellm_ir.runtime.planner import OnlinePlanner
from sagellm_ir.target import Target, Tier
from tests.embedded.tiny import SEED, TINY, oracle

PIPELINE = "O2"
MODEL = random_model(TINY, seed=SEED)
TARGET = Target(
    block_size=4,
    max_tokens=24,
    max_batch=4,
    max_loops=3,
    tiers=(Tier("device", 40), Tier("host", 40)),
    model=MODEL.spec,
)


def answers(
    requests: list[PlanRequest], target: Target, every: int, reserve: int | None = None
) -> tuple[dict[str, list[int]], OnlinePlanner]:
    """The tokens of each request when one more is submitted every so many steps."""
    engine = EmbeddedEngine(MODEL, target, stop_at_eos=False)
    planner = OnlinePlanner(target, PIPELINE, reserve=reserve)
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    waiting, steps = list(requests), 0
    while True:
        if waiting and steps % every == 0:
            engine.submit(waiting[0])
            planner.submit(waiting.pop(0))
        step = planner.next_step(engine.view())
        steps += 1
        if step is None and not waiting:
            return found, planner
        for event in engine.step(step) if step else ():
            if event.token is not None:
                found[event.request].append(event.token)


def test_tokens_do_not_depend_on_the_traffic() -> None:
    torch.set_num_threads(1)
    draw = random.Random(7)
    documents = [[draw.randrange(MODEL.config.vocab) for _ in range(18)] for _ in range(2)]
    requests = []
    for number in range(7):
        tail = [draw.randrange(MODEL.config.vocab) for _ in range(draw.randrange(1, 9))]
        tokens = (*draw.choice(documents), *tail)
        requests.append(
            PlanRequest(
                f"r{number}",
                max_new_tokens=draw.randrange(2, 20),
                prompt_len=len(tokens),
                tokens=tokens,
            )
        )
    alone = {r.id: oracle(MODEL, r.tokens or (), r.max_new_tokens) for r in requests}
    for every, reserve in ((1, None), (3, None), (2, 4)):
        found, planner = answers(requests, TARGET, every, reserve)
        assert found == alone
        assert planner.epochs > 3
