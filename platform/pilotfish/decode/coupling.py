"""The coupling behind drafted decoding: a token of one law, equal to a token of another if it can.

Shapes: R rows, V vocabulary.
"""

from torch import Tensor

from pilotfish.noise import invert_cdf


def couple(
    target_RV: Tensor,
    draft_RV: Tensor,
    drafted_R: Tensor,
    accept_R: Tensor,
    residual_R: Tensor,
) -> Tensor:
    """Return one token per row [R] whose law is `target`, given `drafted` tokens of law `draft`.

    Rejection sampling (Leviathan et al., "Fast Inference from Transformers via Speculative
    Decoding", ICML 2023, section 2.3; Chen et al. 2023, algorithm 2): the drafted token d is kept
    with probability min(1, target(d) / draft(d)); otherwise the token is drawn from the residual
    law max(0, target - draft), renormalised. No other rule keeps it more often. `accept` and
    `residual` are uniforms. Laws need not be normalised.
    """
    target_RV = target_RV / target_RV.sum(-1, keepdim=True)
    draft_RV = draft_RV / draft_RV.sum(-1, keepdim=True)
    picked_R1 = drafted_R[:, None]
    at_draft_R = draft_RV.gather(1, picked_R1)[:, 0]
    rejected_R = accept_R.to(at_draft_R.dtype) * at_draft_R >= target_RV.gather(1, picked_R1)[:, 0]
    rows = rejected_R.nonzero()[:, 0]
    if len(rows) == 0:
        return drafted_R
    residual_RV = (target_RV[rows] - draft_RV[rows]).clamp_min_(0)
    # Equal laws leave nothing but rounding to draw from.
    empty_R1 = residual_RV.sum(-1, keepdim=True) <= 0
    residual_RV = residual_RV.where(~empty_R1, target_RV[rows])
    return drafted_R.index_copy(0, rows, invert_cdf(residual_RV, residual_R[rows]))
