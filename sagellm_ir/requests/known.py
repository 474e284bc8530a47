"""The fields a record may have."""

from typing import Any

__all__ = ["HARMLESS", "OWN", "UNSUPPORTED", "has_effect"]

# fmt: off
OWN = frozenset({
    "id", "custom_id", "messages", "prompt", "tokens", "prompt_token_ids", "token_ids",
    "input_ids", "max_new_tokens", "max_completion_tokens", "max_tokens", "n", "temperature",
    "top_p", "top_k", "seed", "stop", "arrival", "timestamp", "priority", "deadline", "adapter",
    "tenant", "session", "session_id", "hash_ids", "block_size", "input_length", "output_length",
    "input", "output", "continue_final_message", "add_generation_prompt",
})
# fmt: on
"""What a record may say; misspelt fields are compared with these."""

# fmt: off
HARMLESS = frozenset({
    "model", "stream", "stream_options", "user", "metadata", "store", "service_tier",
    "safety_identifier", "logprobs", "top_logprobs", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls", "echo", "modalities", "object", "created",
    "type", "verbosity",
})
# fmt: on
"""OpenAI fields that do not change which tokens are computed (the target names the model)."""

# fmt: off
UNSUPPORTED = frozenset({
    "audio", "best_of", "frequency_penalty", "function_call", "functions", "logit_bias", "min_p",
    "min_tokens", "prediction", "presence_penalty", "reasoning_effort", "repetition_penalty",
    "response_format", "suffix", "tool_choice", "tools", "web_search_options",
})
# fmt: on
"""Known fields that would change the answer: saying so is better than ignoring them silently."""

_NO_EFFECT: tuple[Any, ...] = (None, 0, "none", "auto", [], {}, {"type": "text"})
_NO_EFFECT_AT_ONE = ("best_of", "repetition_penalty")


def has_effect(name: str, value: Any) -> bool:
    """Whether a field of `UNSUPPORTED` with this value would change the answer."""
    return not (value in _NO_EFFECT or (value == 1 and name in _NO_EFFECT_AT_ONE))
