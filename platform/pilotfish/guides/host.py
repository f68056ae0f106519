"""What a process offers to the guides it loads: its base, and ways to load models beside it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from pilotfish.chat import stop_ids
from pilotfish.errors import CheckpointError, ConfigError
from pilotfish.guides.base import LogprobSource, TextModel
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.loading import Dtype, load_frozen, load_frozen_scorer, load_tokenizer
from pilotfish.models.reward import RewardModel, RewardReading
from pilotfish.models.vocab import check_same_vocab, fingerprint

OpenTextModel: TypeAlias = Callable[[CausalLM, PreTrainedTokenizerBase, frozenset[int]], TextModel]
"""Makes a text model of an LM, its tokenizer, and the ids that end what it writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuideHost:
    """Where guides are loaded. Models that speak token ids must share the base's vocabulary."""

    base: CausalLM
    tokenizer: PreTrainedTokenizerBase
    name: str = "base"
    """Of the base, for messages."""
    end_ids: frozenset[int] = frozenset()
    """What ends a completion of the base."""
    num_slots: int = 32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: Dtype = "auto"
    remote: LogprobSource | None = None
    """Stands in for the guide's own LM, where that runs elsewhere."""
    open_text_model: OpenTextModel | None = None
    """How LMs decode that write text of their own; the guides know no decode loop."""
    lms: list[CausalLM | RewardModel] = field(default_factory=list)
    """Every model loaded so far, so that forwards can be counted."""

    def for_guide(
        self, *, num_slots: int, dtype: Dtype, remote: LogprobSource | None
    ) -> "GuideHost":
        """Return the host of one guide, with a cache and a precision of its own."""
        return replace(self, num_slots=num_slots, dtype=dtype, remote=remote)

    def load_lm(self, folder: str | Path, *, num_slots: int | None = None) -> CausalLM:
        """Load a causal LM over the base's token ids. Raises `VocabMismatchError` for others."""
        self.load_tokenizer(folder)
        model = load_frozen(folder, device=self.device, dtype=self.dtype)
        lm = CausalLM(model, vocab_size=self.base.vocab_size, num_slots=num_slots or self.num_slots)
        self.lms.append(lm)
        return lm

    def load_source(self, folder: str | Path) -> LogprobSource:
        """Return the guide's LM: the one that runs elsewhere, or one loaded here."""
        return self.load_lm(folder) if self.remote is None else self.remote

    def load_reward(
        self,
        folder: str | Path,
        reading: RewardReading,
        *,
        num_slots: int | None = None,
    ) -> RewardModel:
        """Load a reward or value model over the base's token ids.

        Raises `VocabMismatchError` for another vocabulary.
        """
        self.load_tokenizer(folder)
        rewards = RewardModel(
            load_frozen_scorer(folder, device=self.device, dtype=self.dtype),
            reading,
            num_slots=num_slots or self.num_slots,
        )
        self.lms.append(rewards)
        return rewards

    def load_text_model(self, folder: str | Path) -> TextModel:
        """Load a causal LM that writes text, with its own tokenizer: any vocabulary will do.

        Raises `ConfigError` where no decode loop is at hand, and what `load_writer` raises.
        """
        if self.open_text_model is None:
            raise ConfigError(
                f"guide {str(folder)!r} writes text, and nothing here can decode it. Load it with "
                "Pilot."
            )
        lm, tokenizer, end_ids = load_writer(
            folder, device=self.device, dtype=self.dtype, num_slots=self.num_slots
        )
        self.lms.append(lm)
        return self.open_text_model(lm, tokenizer, end_ids)

    def load_tokenizer(self, folder: str | Path) -> PreTrainedTokenizerBase:
        """Load a tokenizer of the base's token ids. Raises `VocabMismatchError` for others."""
        tokenizer = load_tokenizer(folder)
        check_same_vocab(
            base=self.name,
            base_vocab=fingerprint(self.tokenizer),
            guide=str(folder),
            guide_vocab=fingerprint(tokenizer),
        )
        return tokenizer


def load_writer(
    folder: str | Path, *, device: str | torch.device, dtype: Dtype, num_slots: int
) -> tuple[CausalLM, PreTrainedTokenizerBase, frozenset[int]]:
    """Load an LM that writes text: with its own tokenizer, and the ids that end what it writes.

    Raises `CheckpointError` for a folder that cannot be loaded or a tokenizer without an end token.
    """
    tokenizer = load_tokenizer(folder)
    model = load_frozen(folder, device=device, dtype=dtype)
    end_ids = stop_ids(tokenizer, model.generation_config)
    if not end_ids:
        raise CheckpointError(
            f"the tokenizer of {str(folder)!r} has no end token, so no text of its model would "
            "ever end. Set `tokenizer.eos_token` and save it again."
        )
    return CausalLM(model, vocab_size=len(tokenizer), num_slots=num_slots), tokenizer, end_ids


def beside(folder: str | Path, path: str) -> str:
    """Resolve a path of a guide's settings: relative to the folder if it is there, else as is."""
    inside = Path(folder) / path
    return str(inside) if inside.exists() else path
