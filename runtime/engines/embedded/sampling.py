"""Drawing tokens from logits: greedy, or seeded with temperature, top-k and top-p."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.request import Sampling
from sagellm_ir.runtime.backend import Likelihood

__all__ = ["Sampler", "draw"]


class Sampler:
    """One request's way of drawing.

    It has a random generator of its own and takes one number a token from it, so what is drawn
    does not depend on which other requests run beside it.

    Raises:
        SageIRError: a parameter is out of its range.
    """

    def __init__(self, sampling: Sampling) -> None:
        ranges = {
            "temperature": (
                sampling.temperature,
                0.0 <= sampling.temperature < float("inf"),
                "0 or more",
            ),
            "top_p": (sampling.top_p, 0.0 < sampling.top_p <= 1.0, "above 0, up to 1"),
            "top_k": (sampling.top_k, sampling.top_k >= 0, "0 (all) or more"),
            "logprobs": (sampling.logprobs, (sampling.logprobs or 0) >= 0, "0 or more"),
        }
        for name, (value, good, expected) in ranges.items():
            if not good:
                raise SageIRError(Diagnostic(f"{name} is {value}, expected {expected}"))
        self.greedy = sampling.temperature == 0.0
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def draw(self, logits: Tensor) -> int:
        """One token from (vocab,) logits."""
        # The likeliest is 0 before the division, so that no temperature, however low, makes it inf.
        scores = logits.double().cpu()
        scores = (scores - scores.max()) / self._sampling.temperature
        top = self._sampling.top_k or len(scores)
        if self._sampling.top_p < 1.0 or top < len(scores):
            scores, tokens = scores.sort(descending=True, stable=True)
            scores = scores[:top]
        else:
            tokens = torch.arange(len(scores))
        weights = scores.softmax(0)
        upto = weights.cumsum(0)
        # Nucleus: the fewest likeliest tokens that together reach top_p.
        kept = upto[upto - weights < self._sampling.top_p]
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * kept[-1]
        place = int(torch.searchsorted(kept, point, right=True))
        return int(tokens[min(place, len(kept) - 1)])

    def likelihood(self, logits: Tensor, token: int) -> Likelihood | None:
        """How likely a token of (vocab,) logits was, if the request asks; before temperature."""
        if (count := self._sampling.logprobs) is None:
            return None
        scores = logits.float().log_softmax(0)
        values, tokens = scores.topk(min(count, len(scores)))
        top = zip(tokens.tolist(), values.tolist(), strict=True)
        return Likelihood(float(scores[token]), tuple(top))


def draw(logits: Tensor, samplers: Sequence[Sampler]) -> list[tuple[int, Likelihood | None]]:
    """One token a row of (rows, vocab) logits, and how likely it was where that is asked for."""
    tokens: list[int] = logits.argmax(-1).tolist() if len(logits) else []
    for row, sampler in enumerate(samplers):
        if not sampler.greedy:
            tokens[row] = sampler.draw(logits[row])
    drawn = enumerate(zip(samplers, tokens, strict=True))
    return [(token, sampler.likelihood(logits[row], token)) for row, (sampler, token) in drawn]
