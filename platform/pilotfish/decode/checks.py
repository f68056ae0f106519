"""Whether an engine can ever decode a request: asked before any work is done."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pilotfish.context import Prompt
from pilotfish.decode.sequence import Request
from pilotfish.errors import ConfigError, PromptError
from pilotfish.guides.base import ChecksPrompts, TokenGuide, max_length_of
from pilotfish.models.causal_lm import CausalLM


@dataclass(frozen=True, slots=True)
class Checks:
    """What an engine has; `guides` and `drafters` are the engine's own and may change."""

    base: CausalLM
    guides: Mapping[str, TokenGuide]
    drafters: Mapping[str, CausalLM]
    end_ids: frozenset[int]
    tokenizer: PreTrainedTokenizerBase | None

    def check(self, request: Request) -> None:
        """Raise `PromptError` if a request can never be decoded, `ConfigError` if not here."""
        unknown = [name for name in request.guides if name not in self.guides]
        if unknown:
            known = ", ".join(self.guides) or "none"
            raise PromptError(f"no guide named {unknown[0]!r} is loaded; loaded: {known}.")
        if request.draft is not None and request.draft.drafter not in self.drafters:
            known = ", ".join(self.drafters) or "none"
            raise PromptError(
                f"nothing named {request.draft.drafter!r} can draft here; drafters: {known}."
            )
        self._check_length(request)
        self._check_ids(request)
        if request.params.stop and self.tokenizer is None:
            raise ConfigError("stop strings need a tokenizer. Build the engine with one.")
        for _, guide in self._acting(request):
            if isinstance(guide, ChecksPrompts):
                guide.check_prompt(request.prompt)
        self._check_reading(request)

    def _acting(self, request: Request) -> Iterator[tuple[str, TokenGuide]]:
        return ((name, self.guides[name]) for name, w in request.guides.items() if w != 0)

    def _check_length(self, request: Request) -> None:
        num_prompt, num_new = len(request.prompt.token_ids), request.params.max_tokens
        if num_prompt == 0:
            raise PromptError("the prompt has no tokens. Give at least one.")
        readers: dict[str, object] = {"the model": self.base}
        for name, guide in self._acting(request):
            readers[f"guide {name!r}"] = guide
        if request.draft is not None:
            readers["the drafter"] = self.drafters[request.draft.drafter]
        for name, reader in readers.items():
            if num_prompt + num_new > (limit := max_length_of(reader)):
                raise PromptError(
                    f"prompt of {num_prompt} tokens plus max_tokens={num_new} is more than the "
                    f"{limit} positions of {name}. Shorten one of them."
                )

    def _check_ids(self, request: Request) -> None:
        size, params = self.base.vocab_size, request.params
        named = {
            "prompt": request.prompt.token_ids,
            "stop": params.stop_token_ids,
            "logit_bias": params.logit_bias,
        }
        for what, ids in named.items():
            strange = next((i for i in ids if not 0 <= i < size), None)
            if strange is not None:
                raise PromptError(f"{what} token id {strange} is outside the vocabulary of {size}.")
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self.end_ids)}
        if params.min_tokens and len(ends) == size:
            raise PromptError(
                f"min_tokens is {params.min_tokens}, but all {size} tokens end the completion, so "
                "none may come first. Leave out one of stop_token_ids."
            )

    def _check_reading(self, request: Request) -> None:
        start = request.read_from
        if start is None:
            if request.params.max_tokens == 0:
                raise PromptError(
                    "max_tokens is 0, wanted an integer >= 1. To score the prompt alone, say from "
                    "which position to read it (read_from)."
                )
            return
        if start < 0:
            raise PromptError(f"read_from is {start}, wanted an integer >= 0.")
        for name, guide in self._acting(request):
            try:
                if isinstance(guide, ChecksPrompts):
                    guide.check_prompt(Prompt(request.prompt.token_ids))
            except PromptError as error:
                raise PromptError(
                    f"a prompt is scored token by token, as ids without a conversation, and guide "
                    f"{name!r} has no law there: {error}"
                ) from error
