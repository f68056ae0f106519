"""From guided log-probs to tokens: temperature, truncation, and one draw per row.

Shapes: R rows, V vocabulary.

Everything here happens after the guides have tilted: truncating first would change their law.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pilotfish.decode.sequence import SamplingParams
from pilotfish.noise import invert_cdf


class SamplingBatch:
    """The sampling parameters of a batch as tensors, made once per change of the batch."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        self.greedy = all(p.temperature == 0 for p in params)
        self._greedy_R = torch.tensor([p.temperature == 0 for p in params], device=device)
        self._any_greedy = any(p.temperature == 0 for p in params)
        temperatures = [p.temperature or 1.0 for p in params]
        self._plain = all(t == 1 for t in temperatures)
        self._temperature_R1 = torch.tensor(temperatures, device=device, dtype=torch.float64)[
            :, None
        ]
        self._any_min_p = any(p.min_p > 0 for p in params)
        min_ps = torch.tensor([p.min_p for p in params], device=device, dtype=torch.float64)
        self._log_min_p_R1 = min_ps.log()[:, None]
        self._max_top_k = max(p.top_k for p in params)
        self._top_k_R = torch.tensor([p.top_k for p in params], device=device)
        self._any_top_p = any(p.top_p < 1 for p in params)
        self._top_p_R1 = torch.tensor(
            [p.top_p for p in params], device=device, dtype=torch.float64
        )[:, None]

    def probs(self, logprobs_RV: Tensor) -> Tensor:
        """Return the law that is drawn from [R, V], up to a factor per row.

        Temperature, then min-p, then top-k, then top-p.
        """
        if self._plain and not (self._any_min_p or self._max_top_k or self._any_top_p):
            return logprobs_RV.exp()
        scaled_RV = (
            logprobs_RV
            if self._plain
            else (logprobs_RV / self._temperature_R1.to(logprobs_RV.dtype))
        )
        if self._any_min_p:
            scaled_RV = self._keep_min_p(scaled_RV)
        if self._max_top_k:
            scaled_RV = self._keep_top_k(scaled_RV)
        probs_RV = scaled_RV.softmax(-1)
        return self._keep_top_p(probs_RV) if self._any_top_p else probs_RV

    def draw(self, logprobs_RV: Tensor, uniforms_R: Tensor) -> Tensor:
        """Return one token id per row [R]."""
        if self.greedy:
            return logprobs_RV.argmax(-1)
        return self.settle(invert_cdf(self.probs(logprobs_RV), uniforms_R), logprobs_RV)

    def settle(self, tokens_R: Tensor, logprobs_RV: Tensor) -> Tensor:
        """Replace what was drawn for greedy rows by the likeliest token."""
        if not self._any_greedy:
            return tokens_R
        return torch.where(self._greedy_R, logprobs_RV.argmax(-1), tokens_R)

    def _keep_min_p(self, logprobs_RV: Tensor) -> Tensor:
        highest_R1 = logprobs_RV.amax(-1, keepdim=True)
        floor_R1 = highest_R1 + self._log_min_p_R1.to(logprobs_RV.dtype)
        return logprobs_RV.masked_fill(logprobs_RV < floor_R1, -torch.inf)

    def _keep_top_k(self, logprobs_RV: Tensor) -> Tensor:
        num_kept = min(self._max_top_k, logprobs_RV.shape[-1])
        best_RK = logprobs_RV.topk(num_kept, dim=-1).values
        place_R = (self._top_k_R.clamp(1, num_kept) - 1)[:, None]
        floor_R1 = best_RK.gather(1, place_R)
        floor_R1 = floor_R1.masked_fill((self._top_k_R == 0)[:, None], -torch.inf)
        return logprobs_RV.masked_fill(logprobs_RV < floor_R1, -torch.inf)

    def _keep_top_p(self, probs_RV: Tensor) -> Tensor:
        ranked_RV, order_RV = probs_RV.sort(dim=-1, descending=True)
        before_RV = ranked_RV.double().cumsum(-1) - ranked_RV
        # A row without top-p keeps its tail even where the sum before it rounds to 1.
        dropped_RV = (before_RV >= self._top_p_R1) & (self._top_p_R1 < 1)
        return probs_RV.scatter(1, order_RV, ranked_RV.masked_fill(dropped_RV, 0))
