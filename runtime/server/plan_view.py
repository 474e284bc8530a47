"""`plan_view`: the live plan as JSON that a client may see."""

import json
from typing import Any

from attrs import evolve

from sagellm_ir.lowering.plan import ExecutionPlan, PlanRequest
from sagellm_ir.lowering.serial import plan_to_json
from sagellm_ir.request import Sampling
from sagellm_ir.runtime.server.access import owner

__all__ = ["plan_view"]


def plan_view(plan: ExecutionPlan, tenant: str | None) -> dict[str, Any]:
    """A plan without prompts, and with numbers instead of the ids of other tenants' requests.

    `tenant` is the asking one; None, when there are no tenants, sees all ids.
    """
    names = {
        request.id: request.id if tenant in (None, owner(request.tenant)) else f"other{number}"
        for number, request in enumerate(plan.requests)
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
    return view


def _shown(request: PlanRequest, name: str) -> PlanRequest:
    return evolve(request, id=name, tokens=None, tenant=None, session=None, sampling=Sampling())
