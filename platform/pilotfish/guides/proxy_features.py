"""What the proxy of Proxy-RLHF sees: the candidates of each row, and the features of each one.

Training and serving share this module, so that the proxy is never asked about anything it was not
trained on. Shapes: R rows, V vocabulary, K candidates in descending order of probability, padded on
the right, D hidden size, E size of an input embedding, F features.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.guides.acceptance import (
    MAX_SUBSET_CANDIDATES,
    AcceptRules,
    count_candidates,
    too_many_subsets,
)
from pilotfish.models.heads import HeadSettings

Features = Literal["post_token", "pre_token"]

_LOWEST = -20.0  # a log-prob below it tells the proxy nothing more


class ProxySettings(AcceptRules):
    """Settings of a proxy guide: the rules of offering candidates, and the proxy's network."""

    top_k: PositiveInt = 40
    """Candidates at most."""
    temperature: PositiveFloat = 0.8
    """Of the law that candidates are drawn from: p^(1/T), renormalised over the candidates, which
    were chosen at temperature 1 before. It leaves `ordered` alone but for the features."""
    features: Features = "post_token"
    """`post_token`: the base's hidden state behind the candidate, by one forward over all of them;
    the one that is emitted needs no second. `pre_token`: the state before it and the candidate's
    input embedding, without any forward."""
    head: HeadSettings = HeadSettings()

    @model_validator(mode="after")
    def _check_top_k(self) -> Self:
        by_sets = self.candidate_order == "sample_no_repeat" and self.p_t_rule == "cumulative"
        if by_sets and self.top_k > MAX_SUBSET_CANDIDATES:
            raise ValueError(f"top_k is {self.top_k}: {too_many_subsets(self.top_k)}")
        return self


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that may be offered in each row."""

    ids_RK: Tensor
    counts: list[int]
    """How many of each row are candidates; the rest is padding, of valid ids."""
    mass_RK: Tensor
    """Probability at temperature 1 among the `top_k` most probable tokens; p_t is about these."""
    logprobs_RK: Tensor
    """Law that candidates are drawn from, at the settings' temperature; padding has -inf."""

    @property
    def count_R(self) -> Tensor:
        return torch.tensor(self.counts, device=self.ids_RK.device)


def find_candidates(logprobs_RV: Tensor, settings: ProxySettings) -> Candidates:
    """Return the candidates of each row, padded to the largest number there is in any."""
    top = logprobs_RV.topk(min(settings.top_k, logprobs_RV.shape[1]), dim=-1)
    mass_RK = top.values.double().softmax(-1)
    count_R = count_candidates(mass_RK, settings)
    counts = count_R.tolist()
    widest = max(counts)
    real_RK = torch.arange(widest, device=count_R.device) < count_R[:, None]
    scaled_RK = top.values[:, :widest].double() / settings.temperature
    return Candidates(
        ids_RK=top.indices[:, :widest],
        counts=counts,
        mass_RK=mass_RK[:, :widest],
        logprobs_RK=scaled_RK.masked_fill(~real_RK, -torch.inf).log_softmax(-1),
    )


def feature_sizes(features: Features, model: PreTrainedModel) -> tuple[list[int], int]:
    """Return the sizes of the state's blocks, and how many extra numbers follow them.

    `model` is the base; its shapes alone are read.
    """
    # Not of their weights, which have no shape while they are partitioned over processes.
    head: Any = model.get_output_embeddings()
    if features == "post_token":
        return [head.in_features], 1
    embedding: Any = model.get_input_embeddings()
    return [head.in_features, embedding.embedding_dim], 2


def post_token_features(hidden_RKD: Tensor, logprobs_RK: Tensor) -> Tensor:
    """Return `[h(c); log p(c)]` [R, K, F]: the base's state behind each candidate."""
    logprob_RK1 = logprobs_RK.clamp_min(_LOWEST)[..., None]
    return _join(hidden_RKD, logprob_RK1)


def pre_token_features(hidden_RD: Tensor, embedded_RKE: Tensor, logprobs_RK: Tensor) -> Tensor:
    """Return `[h_t; E(c); log p(c); log(1 + rank)]` [R, K, F], where ranks count from 0."""
    num_rows, num_candidates = logprobs_RK.shape
    state_RKD = hidden_RD[:, None].expand(-1, num_candidates, -1)
    rank_K = torch.arange(num_candidates, dtype=torch.float64, device=logprobs_RK.device)
    rank_RK = rank_K.log1p().expand(num_rows, -1)
    extra_RK2 = torch.stack([logprobs_RK.clamp_min(_LOWEST), rank_RK], dim=-1)
    return _join(state_RKD, embedded_RKE, extra_RK2)


def _join(state: Tensor, *more: Tensor) -> Tensor:
    """Side by side in the state's precision, in float32 at least."""
    dtype = torch.promote_types(state.dtype, torch.float32)
    return torch.cat([state.to(dtype), *(one.to(dtype) for one in more)], dim=-1)
