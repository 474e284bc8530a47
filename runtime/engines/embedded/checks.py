"""What must fit before anything runs: targets to the model, requests to the pool."""

from attrs import fields

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import PlanRequest
from sagellm_ir.runtime.engines.embedded.model import CausalLM
from sagellm_ir.runtime.protocols import CapabilityDescriptor, QuantizationProfile
from sagellm_ir.target import DEVICE, ModelSpec, Target

__all__ = ["check_profile", "check_request", "check_target"]


def check_target(
    target: Target,
    found: ModelSpec,
    capability: CapabilityDescriptor,
    within: Target | None = None,
) -> None:
    """Raise `SageIRError` unless an engine can run a target, inside the pool of `within` if given.

    Args:
        found: the engine's model, with the size its KV has there.
    """
    wrong = [
        f"{f.name}: the target has {getattr(target.model, f.name)}, the model {getattr(found, f.name)}"
        for f in fields(ModelSpec)
        if f.name != "name" and getattr(target.model, f.name) != getattr(found, f.name)
    ]
    if wrong:
        raise SageIRError(
            Diagnostic(
                f"target {target.name!r} is for another model, dtype or KV schema",
                notes=tuple(wrong),
                help="compile for a target with this model's spec (`model.spec`, and "
                "`KVSchemaConfig.fit` where KV is stored in another type)",
            )
        )
    if target.tp > capability.max_tp:
        raise SageIRError(
            Diagnostic(
                f"target {target.name!r} wants {target.tp} tensor-parallel ranks; the embedded "
                "engine is one process",
                help="set tp = 1, or use another engine",
            )
        )
    if target.tier(DEVICE) is None:
        raise SageIRError(Diagnostic(f"target {target.name!r} has no tier {DEVICE!r}"))
    if within is not None:
        _check_within(target, within)


def _check_within(target: Target, within: Target) -> None:
    """Raise unless a plan for `target` can run on an engine made for `within`."""
    if target.block_size != within.block_size:
        raise SageIRError(
            Diagnostic(
                f"the plan has blocks of {target.block_size} tokens, the engine's have "
                f"{within.block_size}",
                help="compile the plan for this engine's target",
            )
        )
    for tier in target.tiers:
        own = within.tier(tier.name)
        if own is None or own.blocks < tier.blocks:
            have = f"{own.blocks} of them" if own else "no such tier"
            raise SageIRError(
                Diagnostic(
                    f"the plan needs {tier.blocks} blocks in tier {tier.name!r}; the engine has {have}",
                    help="compile the plan for this engine's target, or enlarge the pool",
                )
            )


def check_profile(profile: QuantizationProfile | None, model: ModelSpec) -> None:
    """Raise `SageIRError` unless the pool can quantise like this."""
    if profile is None:
        return
    profile.check(model)
    if profile.scales == "block":
        # A block is filled token by token, and its scale would change under what it holds already.
        message = "the embedded engine keeps a scale for each token and head, not for each block"
        raise SageIRError(Diagnostic(message, help="set scales to token_head, or to head"))


def check_request(request: PlanRequest, model: CausalLM, target: Target, running: bool) -> None:
    """Raise `SageIRError` unless the engine can answer a request."""
    name = f"request {request.id!r}"
    if running:
        raise SageIRError(Diagnostic(f"{name} is running already: ids are unique"))
    if request.adapter is not None:
        raise SageIRError(
            Diagnostic(f"{name} wants adapter {request.adapter!r}; none can be loaded")
        )
    if not request.tokens or len(request.tokens) != request.prompt_len:
        raise SageIRError(
            Diagnostic(
                f"{name} has no prompt tokens for its {request.prompt_len} prompt positions",
                help="a trace without tokens runs on the simulator",
            )
        )
    if bad := [t for t in request.tokens if not 0 <= t < model.config.vocab]:
        raise SageIRError(
            Diagnostic(
                f"{name} has token {bad[0]}; the vocabulary ends at {model.config.vocab - 1}"
            )
        )
    tier = target.tier(DEVICE)
    room = tier.blocks * target.block_size if tier else 0
    if request.prompt_len > room:
        raise SageIRError(
            Diagnostic(
                f"{name} has a prompt of {request.prompt_len} tokens, longer than the whole KV pool "
                f"({room} tokens)",
                help=f"shorten it, or give tier {DEVICE!r} at least "
                f"{-(-request.prompt_len // target.block_size)} blocks",
            )
        )
    longest = request.prompt_len + request.max_new_tokens
    if longest > model.config.max_position:
        raise SageIRError(
            Diagnostic(
                f"{name} may grow to {longest} tokens; the model's limit is "
                f"{model.config.max_position}",
                help="shorten the prompt or lower max_new_tokens",
            )
        )
