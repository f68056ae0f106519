"""Accept or reject: the exact law of a token whose candidates are offered one after another.

Zhu et al., "Proxy-RLHF: Decoupling Generation and Alignment in Large Language Model with Proxy",
2024, offer a token of the base to a proxy, which accepts it or rejects it for another one. Where
that paper is silent we follow its successor MARA: Zhang et al., "Token-level Accept or Reject: A
Micro Alignment Approach for Large Language Models", IJCAI 2025, and say "our reading" else.

Shapes: R rows, V vocabulary, K candidates in descending order of probability, padded on the right,
T nodes of an integral, S sets of candidates, N sets of one size.

Plain functions of tensors, computed in float64; no models, no draws. Gradients pass through.
"""

import math
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from pilotfish.config import Config
from pilotfish.errors import ConfigError

MAX_SUBSET_CANDIDATES = 12
"""The law of `sample_no_repeat` under `cumulative` sums over two to the power of so many sets."""

_SLACK = 1e-12  # sums of probabilities equal p_t up to rounding
_TINY = 1e-280  # a candidate may underflow under a low temperature, and is still offered last
_STEP, _FIRST = 0.2, -34.0  # of the logarithm of time
_ROWS = 8  # computed at a time, so that what is computed stays in the processor's cache


class AcceptRules(Config):
    """Which candidates may be offered, in which order, and what is emitted when all are rejected.

    `candidate_order`:

    - `ordered`: in descending probability (as MARA does).
    - `sample_no_repeat`: drawn from the base, a rejected one never again at this position.
    - `iid`: drawn from the base each time anew, at most `max_tries` times.

    `p_t_rule` keeps the proxy within what the base knows. The paper names p_t and no formula, so
    each rule is our reading. Probabilities are those at temperature 1 among the `top_k` candidates:

    - `nucleus`: the candidates are the smallest set of top tokens whose mass reaches p_t, one at
      least (MARA's top-p). p_t=0 leaves the top token alone, whatever the proxy says; p_t=1 leaves
      all of them, and all but one may be rejected.
    - `cumulative`: all are candidates, but one whose rejection would lift the rejected mass above
      p_t must be accepted. p_t=0 is the base for any proxy; with p_t=1 all but one may be rejected.
      Under `iid` nothing stays rejected, so that a candidate's own mass alone is compared.
    - `min_prob`: the candidates are the tokens of probability p_t at least, and the top token. Here
      p_t is a floor: 0 restricts nothing, 1 leaves the top token.
    - `literal`: all are candidates, but one of probability below p_t must be accepted; p_t=0 forces
      none. A proxy that rejects a near-certain token then forces a near-impossible one, and can
      leave the language: an ablation.

    In the order `ordered`, `nucleus` and `cumulative` agree unless a mass equals p_t exactly.
    """

    candidate_order: Literal["ordered", "sample_no_repeat", "iid"] = "ordered"
    p_t_rule: Literal["nucleus", "cumulative", "min_prob", "literal"] = "nucleus"
    p_t: float = Field(default=0.95, ge=0, le=1)
    fallback: Literal["last", "top1"] = "last"
    """What is emitted when every candidate was rejected: the last one offered (so that it is not
    asked about), or the most probable one."""
    max_tries: PositiveInt | None = None
    """Candidates offered under `iid`; None is without end."""

    @model_validator(mode="after")
    def _check_tries(self) -> Self:
        if self.max_tries is not None and self.candidate_order != "iid":
            raise ValueError(
                f"max_tries is {self.max_tries}, but only candidate_order=iid counts tries; "
                f"got {self.candidate_order}. Leave it out"
            )
        return self


class AcceptLaw(NamedTuple):
    """What comes of offering candidates."""

    law_RK: Tensor
    """Probability of each candidate to be emitted; padding has exactly 0."""
    rejects_R: Tensor
    """Expected number of candidates offered after the first, each behind a rejection: at most one
    less than there are candidates, or tries."""


def count_candidates(mass_RK: Tensor, rules: AcceptRules) -> Tensor:
    """Return how many of the top candidates may be offered [R], at least one.

    `mass_RK` is the base's probability, descending; 0 where a token is forbidden. One candidate is
    no decision: it is emitted and the proxy need not be asked.
    """
    allowed_RK = mass_RK > 0
    if rules.p_t_rule == "nucleus" and rules.p_t < 1:
        before_RK = mass_RK.double().cumsum(-1) - mass_RK
        allowed_RK = allowed_RK & (before_RK < rules.p_t * (1 - _SLACK))
    elif rules.p_t_rule == "min_prob":
        allowed_RK = allowed_RK & (mass_RK >= rules.p_t)
    return allowed_RK.sum(-1).clamp_min(1)


def accept_law(
    probs_RK: Tensor,
    accept_RK: Tensor,
    count_R: Tensor,
    rules: AcceptRules,
    *,
    mass_RK: Tensor | None = None,
) -> AcceptLaw:
    """Return the law of the emitted candidate, and how many rejections to expect.

    `probs_RK` is the law that candidates are drawn from (renormalised here over the first `count_R`
    of each row; what stands behind them is ignored), `accept_RK` the probability that the proxy
    accepts each one, `mass_RK` what p_t is compared with (default: `probs_RK`). Raises
    `ConfigError` for too many candidates of `sample_no_repeat` under `cumulative`.
    """
    places_K = torch.arange(probs_RK.shape[1], device=probs_RK.device)
    real_RK = places_K < count_R[:, None]
    mass_RK = (probs_RK if mass_RK is None else mass_RK).double().where(real_RK, 0.0)
    probs_RK = probs_RK.double().clamp_min(_TINY).where(real_RK, 0.0)
    probs_RK = probs_RK / probs_RK.sum(-1, keepdim=True)
    accept_RK = accept_RK.double().where(real_RK, 0.0)
    accept_RK = accept_RK.masked_fill((count_R == 1)[:, None] & real_RK, 1.0)
    if rules.candidate_order == "ordered":
        return _ordered(_force(accept_RK, mass_RK.cumsum(-1), mass_RK, rules), count_R, rules)
    if rules.candidate_order == "iid":
        return _resampled(probs_RK, _force(accept_RK, mass_RK, mass_RK, rules), rules)
    split = (x.split(_ROWS) for x in (probs_RK, accept_RK, mass_RK))
    parts = [_without_repeat(p, a, mass, rules) for p, a, mass in zip(*split, strict=True)]
    return AcceptLaw(
        torch.cat([part.law_RK for part in parts]), torch.cat([part.rejects_R for part in parts])
    )


def reject_to(probs_RV: Tensor, reject_RV: Tensor, fallback_RV: Tensor) -> Tensor:
    """Return the law [R, V] of a token drawn once and, if rejected, replaced by a fallback's.

    `pi(v) = p(v) (1 - mu(v)) + q(v) sum_w p(w) mu(w)`, with `mu` the probability of rejecting v.
    """
    rejected_R1 = (probs_RV * reject_RV).sum(-1, keepdim=True)
    return probs_RV * (1 - reject_RV) + fallback_RV * rejected_R1


def _force(accept_RK: Tensor, at_stake_RK: Tensor, mass_RK: Tensor, rules: AcceptRules) -> Tensor:
    """Accept what p_t does not let be rejected; `at_stake` is the mass that would be rejected."""
    if rules.p_t_rule == "cumulative":
        return accept_RK.masked_fill(_exceeds(at_stake_RK, rules) & (mass_RK > 0), 1.0)
    if rules.p_t_rule == "literal":
        return accept_RK.masked_fill((mass_RK < rules.p_t) & (mass_RK > 0), 1.0)
    return accept_RK


def _exceeds(mass: Tensor, rules: AcceptRules) -> Tensor:
    return mass > rules.p_t * (1 + _SLACK)


def _ordered(accept_RK: Tensor, count_R: Tensor, rules: AcceptRules) -> AcceptLaw:
    """`pi(c_i) = a_i prod_{j<i} (1 - a_j)`, and what is left to the fallback."""
    rejected_RK = (1 - accept_RK).cumprod(-1)
    offered_RK = torch.cat([torch.ones_like(rejected_RK[:, :1]), rejected_RK[:, :-1]], dim=1)
    places_K = torch.arange(accept_RK.shape[1], device=accept_RK.device)
    offered_RK = offered_RK.where(places_K < count_R[:, None], 0.0)
    target_R = count_R - 1 if rules.fallback == "last" else torch.zeros_like(count_R)
    # Padding accepts nothing, so the last column holds the chance that all were rejected.
    law_RK = (offered_RK * accept_RK).scatter_add(1, target_R[:, None], rejected_RK[:, -1:])
    return AcceptLaw(law_RK, (offered_RK.sum(-1) - 1).clamp_min(0))


def _resampled(probs_RK: Tensor, accept_RK: Tensor, rules: AcceptRules) -> AcceptLaw:
    """At most M independent draws, of which the fallback `last` accepts the M-th in any case.

    `pi_i = p_i (a_i (1 - (1-m)^(M-1)) / m + (1-m)^(M-1))` with `m = sum_j p_j a_j`, and
    `p_i a_i / m` without end. Where nothing is ever accepted, the limit is the fallback's.
    """
    mean_R1 = (probs_RK * accept_RK).sum(-1, keepdim=True).clamp_max(1)
    left_R1, visits_R1 = _geometric(
        mean_R1, math.inf if rules.max_tries is None else rules.max_tries - 1
    )
    rejects_R = ((1 - mean_R1) * visits_R1)[:, 0]
    if rules.fallback == "last":
        return AcceptLaw(probs_RK * (accept_RK * visits_R1 + left_R1), rejects_R)
    law_RK = probs_RK * accept_RK * (visits_R1 + left_R1)
    return AcceptLaw(_add_to_top(law_RK, left_R1 * (1 - mean_R1)), rejects_R)


def _geometric(mean_R1: Tensor, num: float) -> tuple[Tensor, Tensor]:
    """Return `(1-m)^num`, and `sum_{n<num} (1-m)^n`."""
    never_R1 = mean_R1 == 0
    mean_R1 = mean_R1.masked_fill(never_R1, 0.5)
    if math.isinf(num):
        left_R1, sum_R1 = torch.zeros_like(mean_R1), 1 / mean_R1
    else:
        # Keeps its digits for a small m, and its gradient at m=1.
        log_R1 = num * torch.log1p(-mean_R1.clamp_max(1 - 2.0**-53))
        left_R1, sum_R1 = log_R1.exp(), -torch.expm1(log_R1) / mean_R1
    most = min(num, torch.finfo(torch.float64).max)
    return left_R1.masked_fill(never_R1, 1.0), sum_R1.masked_fill(never_R1, most)


def _without_repeat(
    probs_RK: Tensor, accept_RK: Tensor, mass_RK: Tensor, rules: AcceptRules
) -> AcceptLaw:
    """Candidates drawn without replacement."""
    if rules.p_t_rule == "cumulative":
        return _by_sets(probs_RK, accept_RK, mass_RK, rules)
    accept_RK = _force(accept_RK, mass_RK, mass_RK, rules)
    offered_RK, last_RK = _race(probs_RK, accept_RK)
    law_RK = offered_RK * accept_RK
    none_R1 = (1 - accept_RK).where(probs_RK > 0, 1.0).prod(-1, keepdim=True)
    if rules.fallback == "last":
        law_RK = law_RK + last_RK * none_R1
    else:
        law_RK = _add_to_top(law_RK, none_R1)
    return AcceptLaw(law_RK, (offered_RK.sum(-1) - 1).clamp_min(0))


def _race(probs_RK: Tensor, accept_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Return each candidate's chance to be offered, and to be the last where none is accepted.

    A race draws the same order: candidate j arrives at a time that is exponential with rate `p_j`.
    So i is offered, since all before it were rejected, with probability
    `int p_i e^(-p_i t) prod_{j != i} (1 - a_j (1 - e^(-p_j t))) dt`: an integral in place of a sum
    over sets of candidates. The last to arrive is i with probability
    `int p_i e^(-p_i t) prod_{j != i} (1 - e^(-p_j t)) dt`, whatever is accepted.

    The trapezoidal rule in the logarithm of time: arrivals of any rate look alike there, the
    integrand decays at both ends and is analytic around the real axis, so that the error falls
    exponentially with the step (below 1e-12 for 40 candidates).
    """
    lowest = float(probs_RK.detach().masked_fill(probs_RK == 0, 1.0).amin())
    num_nodes = math.ceil((math.log(40 / lowest) - _FIRST) / _STEP) + 1
    nodes_T = torch.arange(num_nodes, dtype=torch.float64, device=probs_RK.device)
    times_T = (_FIRST + _STEP * nodes_T).exp()
    rates_RTK = probs_RK[:, None] * times_T[:, None]
    odds_RTK = rates_RTK.clamp_max(700).expm1()  # of having arrived
    arrived_RTK = -(-rates_RTK).expm1()
    open_RT1 = (1 - accept_RK[:, None] * arrived_RTK).prod(-1, keepdim=True)
    offered_RTK = rates_RTK * open_RT1 / (1 + (1 - accept_RK[:, None]) * odds_RTK)
    real_R1K = (probs_RK > 0)[:, None]
    all_RT1 = arrived_RTK.where(real_R1K, 1.0).prod(-1, keepdim=True)
    last_RTK = rates_RTK * all_RT1 / odds_RTK.where(real_R1K, 1.0)
    return _STEP * offered_RTK.sum(1), _STEP * last_RTK.sum(1)


def _by_sets(probs_RK: Tensor, accept_RK: Tensor, mass_RK: Tensor, rules: AcceptRules) -> AcceptLaw:
    """What may be rejected depends on what was: sum over sets of candidates, smallest first."""
    num = probs_RK.shape[1]
    if num > MAX_SUBSET_CANDIDATES:
        raise ConfigError(too_many_subsets(num))
    bits_K = 2 ** torch.arange(num, device=probs_RK.device)
    sets_S = torch.arange(2**num, device=probs_RK.device)
    outside_SK = ((sets_S[:, None] & bits_K) == 0).double()
    left_RS = probs_RK @ outside_SK.T  # sums of what is left keep their digits; 1 - sum would not
    forced_RS = _exceeds(mass_RK @ (1 - outside_SK).T, rules)
    if rules.fallback == "last":
        forced_RS = forced_RS | (left_RS == 0)
    safe_RS = left_RS.masked_fill(left_RS == 0, 1.0)
    reach_RS = torch.zeros_like(left_RS).index_fill(1, sets_S[:1], 1.0)
    law_RK, offers_R = torch.zeros_like(probs_RK), torch.zeros_like(probs_RK[:, 0])
    sizes_S = num - outside_SK.sum(-1)
    for size in range(num):
        sets_N = sets_S[sizes_S == size]
        larger_NK = sets_N[:, None] | bits_K
        share_RN = reach_RS[:, sets_N] / safe_RS[:, sets_N]
        offered_RNK = share_RN[..., None] * probs_RK[:, None] * outside_SK[sets_N]
        accepted_RNK = accept_RK[:, None].masked_fill(forced_RS[:, larger_NK], 1.0)
        law_RK = law_RK + (offered_RNK * accepted_RNK).sum(1)
        offers_R = offers_R + offered_RNK.sum((1, 2))
        rejected_RNK = offered_RNK * (1 - accepted_RNK)
        reach_RS = reach_RS.index_add(1, larger_NK.flatten(), rejected_RNK.flatten(1))
    none_R1 = reach_RS.masked_fill(left_RS > 0, 0.0).sum(-1, keepdim=True)
    return AcceptLaw(_add_to_top(law_RK, none_R1), (offers_R - 1).clamp_min(0))


def too_many_subsets(num: int) -> str:
    """Say why the law of so many candidates is not computed."""
    return (
        f"{num} candidates with candidate_order=sample_no_repeat and p_t_rule=cumulative, wanted "
        f"at most {MAX_SUBSET_CANDIDATES}: the exact law sums over every set of rejected ones. "
        "Lower top_k, or choose p_t_rule=nucleus or candidate_order=ordered."
    )


def _add_to_top(law_RK: Tensor, more_R1: Tensor) -> Tensor:
    return torch.cat([law_RK[:, :1] + more_R1, law_RK[:, 1:]], dim=1)
