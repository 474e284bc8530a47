"""`plan_view`: the live plan as JSON that a client may see."""

import json
from collections.abc import Sequence
from typing import Any

from attrs import evolve

from sagellm_ir.lowering.plan import ExecutionPlan, PlanRequest
from sagellm_ir.lowering.serial import plan_to_json
from sagellm_ir.request import Sampling
from sagellm_ir.runtime.server.access import owner

__all__ = ["plan_view"]


def plan_view(
    plan: ExecutionPlan, decoding: Sequence[PlanRequest], tenant: str | None
) -> dict[str, Any]:
    """A plan without prompts, and with numbers instead of the ids of other tenants' requests.

    Args:
        plan: what was compiled last.
        decoding: requests whose answers are under way, whatever plan they came from; the view
            has their ids as `decoding`.
        tenant: the asking one; None, when there are no tenants, sees all ids.
    """
    both = {request.id: request for request in (*plan.requests, *decoding)}
    names = {
        request.id: request.id if tenant in (None, owner(request.tenant)) else f"other{number}"
        for number, request in enumerate(both.values())
    }
    steps = tuple(
        evolve(
            step,
            binds=tuple(evolve(bind, request=names[bind.request]) for bind in step.binds),
            prefill=tuple(evolve(chunk, request=names[chunk.request]) for chunk in step.prefill),
            decode=tuple(names[name] for name in step.decode),
            groups=tuple(
                evolve(group, requests=tuple(names[name] for name in group.requests))
                for group in step.groups
            ),
        )
        for step in plan.steps
    )
    shown = evolve(
        plan,
        requests=tuple(_shown(request, names[request.id]) for request in plan.requests),
        steps=steps,
        live=tuple(evolve(live, request=names[live.request]) for live in plan.live),
    )
    view: dict[str, Any] = json.loads(plan_to_json(shown))
    return view | {"decoding": [names[request.id] for request in decoding]}


def _shown(request: PlanRequest, name: str) -> PlanRequest:
    return evolve(request, id=name, tokens=None, tenant=None, session=None, sampling=Sampling())
