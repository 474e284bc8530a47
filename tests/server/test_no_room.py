"""Requests that are under way and no longer fit together: nothing fails, tokens stay the same."""

import torch

from sagellm_ir.lowering.plan import PlanRequest
from sagellm_ir.runtime.planner import OnlinePlanner
from tests.server.tiny import load_tiny

FOX = (30, 87, 120, 182, 92, 72, 101, 68, 89, 59, 240, 220, 53, 224, 91, 205)
OWL = (58, 79, 237, 187, 131, 108, 60, 148, 117, 216, 108, 126, 21, 119, 145, 205, 93, 113, 146, 81, 239)  # fmt: skip
CAT = (234, 62, 5, 15, 226, 207, 175, 38, 220, 178, 95)
# Found by a soak with aborts, then made smaller: prompt, new tokens, priority, tenant, session.
TRAFFIC = (
    ((*FOX, 70, 42, 148), 5, 3, None, "t"),
    ((*FOX, 62, 128, 65), 8, 0, None, "t"),
    ((*OWL, 244, 239, 144), 9, 3, "a", "s"),
    ((*OWL, 160), 9, 3, None, None),
    ((*OWL, 44, 46, 235, 51, 242), 2, 3, None, "s"),
    ((*CAT, 242), 8, 3, None, "t"),
    ((*OWL, 12, 244, 30, 182, 26, 100, 40, 233), 1, 0, None, "s"),
    (OWL, 4, 0, "a", None),
    ((*OWL, 231, 224, 55, 183), 4, 3, None, None),
    ((*CAT, 242, 2, 190, 82, 151, 200, 207, 130, 199), 1, 0, None, "s"),
    ((*FOX, 201, 219, 240, 185, 208), 1, 3, None, "s"),
    ((*OWL, 212, 49, 237, 224, 118, 84), 4, 3, None, None),
    ((*CAT, 91, 174, 146, 207, 245, 72, 208), 5, 0, None, None),
)
LEAVES, AFTER = "r3", 8


def answers(blocks: int, pipeline: str) -> dict[str, list[int]]:
    """The tokens of each request; one is aborted after so many steps."""
    loaded = load_tiny(blocks)
    engine, planner = loaded.backend, OnlinePlanner(loaded.target, pipeline)
    found: dict[str, list[int]] = {}
    for number, (tokens, new, priority, tenant, session) in enumerate(TRAFFIC):
        request = PlanRequest(
            f"r{number}",
            max_new_tokens=new,
            priority=priority,
            tenant=tenant,
            session=session,
            prompt_len=len(tokens),
            tokens=tokens,
        )
        found[request.id] = []
        engine.submit(request)
        planner.submit(request)
    steps = 0
    while (step := planner.next_step(engine.view())) is not None:
        for event in engine.step(step):
            if event.token is not None:
                found[event.request].append(event.token)
        steps += 1
        if steps == AFTER:
            engine.abort(LEAVES)
    del found[LEAVES]
    return found


def test_what_no_longer_fits_together_waits_and_is_computed_again() -> None:
    torch.set_num_threads(1)
    assert answers(13, "O2") == answers(256, "O0")
