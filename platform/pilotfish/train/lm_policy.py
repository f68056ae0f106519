"""What learns when a whole LM learns from reward: the LM itself, and a critic of its size.

RLHF as in Ouyang et al., "Training language models to follow instructions with human feedback",
NeurIPS 2022: PPO on every token, with a penalty for leaving a reference model.

Shapes: E episodes, S tokens of the longest text and T of the longest completion, padded on the
right, V vocabulary, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilotfish.decode.engine import Engine
from pilotfish.models.causal_lm import CausalLM, logit_rule
from pilotfish.train.experience import Episode, mask_of, pad_rows
from pilotfish.train.ppo import Evaluation


class LMPolicy(nn.Module):
    """A causal LM as the actor, and as the critic a sequence classifier with one label over the
    same vocabulary, which is read before every token."""

    def __init__(
        self, actor: PreTrainedModel, critic: PreTrainedModel, *, vocab_size: int | None = None
    ) -> None:
        """`vocab_size` cuts logits that pad the vocabulary, as in `CausalLM`."""
        super().__init__()
        self.actor = actor
        self.critic = critic
        self._vocab_size = vocab_size

    def forward(
        self,
        mask_ET: Tensor,
        token_ids_ES: Tensor,
        attention_mask_ES: Tensor,
        columns_ET: Tensor,
        choice_ET: Tensor,
    ) -> Evaluation:
        """Judge completions anew; the arguments are what `collate` makes."""
        read = token_ids_ES, attention_mask_ES, columns_ET
        law_ETV = _laws(self.actor, *read, vocab_size=self._vocab_size)
        score: Any = self.critic.score
        found = (
            law_ETV.gather(2, choice_ET[..., None])[..., 0],
            -(law_ETV.exp() * law_ETV).sum(-1),
            score(_hidden(self.critic, *read))[..., 0].to(law_ETV.dtype),
        )
        return Evaluation(*(one_ET.where(mask_ET, 0.0) for one_ET in found))


def collate(
    episodes: Sequence[Episode], *, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return what `LMPolicy.forward` takes, of some episodes."""
    texts = [np.concatenate([one.prompt_ids, one.completion_ids]) for one in episodes]
    starts = [len(one.prompt_ids) for one in episodes]
    inputs = {
        "mask_ET": mask_of(episodes),
        "token_ids_ES": pad_rows([torch.from_numpy(text).long() for text in texts]),
        "attention_mask_ES": pad_rows([torch.ones(len(text), dtype=torch.long) for text in texts]),
        # Where a token is predicted: behind the text before it.
        "columns_ET": pad_rows(
            [
                torch.from_numpy(one.positions_N + (start - 1)).long()
                for one, start in zip(episodes, starts, strict=True)
            ]
        ),
        "choice_ET": pad_rows(
            [torch.from_numpy(one.completion_ids[one.positions_N]).long() for one in episodes]
        ),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def actor_engine(
    actor: PreTrainedModel,
    *,
    num_slots: int,
    end_ids: frozenset[int],
    vocab_size: int | None = None,
    **settings: Any,
) -> Engine:
    """Return an engine that samples from an LM as it is now.

    Make a new one after every update: an older one has caches of older weights. It leaves the model
    in `eval` mode.
    """
    base = CausalLM(actor, vocab_size=vocab_size, num_slots=num_slots, pack=False)
    return Engine(base, end_ids=end_ids, **settings)


@torch.no_grad()
def with_reference(
    episodes: Sequence[Episode],
    reference: PreTrainedModel,
    *,
    batch_size: int,
    vocab_size: int | None = None,
) -> list[Episode]:
    """Return the episodes with a reference model's log-probs as those of the base."""
    done = []
    for at in range(0, len(episodes), batch_size):
        some = episodes[at : at + batch_size]
        inputs = collate(some, device=reference.device)
        law_ETV = _laws(
            reference,
            inputs["token_ids_ES"],
            inputs["attention_mask_ES"],
            inputs["columns_ET"],
            vocab_size=vocab_size,
        )
        logprobs_ET = law_ETV.gather(2, inputs["choice_ET"][..., None])[..., 0].float().cpu()
        for episode, logprobs in zip(some, logprobs_ET.numpy(), strict=True):
            own = logprobs[: len(episode.positions_N)].copy()
            done.append(replace(episode, base_logprobs_N=own))
    return done


def _laws(
    model: PreTrainedModel,
    token_ids_ES: Tensor,
    attention_mask_ES: Tensor,
    columns_ET: Tensor,
    *,
    vocab_size: int | None,
) -> Tensor:
    """Return the next-token laws behind some columns [E, T, V], in at least float32.

    The output embedding sees those columns alone: a prompt's logits would be most of the memory.
    """
    hidden_ETD = _hidden(model, token_ids_ES, attention_mask_ES, columns_ET)
    output_embedding: Any = model.get_output_embeddings()
    finish = logit_rule(model.config.get_text_config())
    logits_ETV = finish(output_embedding(hidden_ETD))[..., :vocab_size]
    wide = logits_ETV.dtype in (torch.float32, torch.float64)
    return (logits_ETV if wide else logits_ETV.float()).log_softmax(-1)


def _hidden(
    model: PreTrainedModel, token_ids_ES: Tensor, attention_mask_ES: Tensor, columns_ET: Tensor
) -> Tensor:
    body: Any = model.base_model
    hidden_ESD = body(
        input_ids=token_ids_ES, attention_mask=attention_mask_ES, use_cache=False
    ).last_hidden_state
    return hidden_ESD[torch.arange(len(columns_ET), device=columns_ET.device)[:, None], columns_ET]
