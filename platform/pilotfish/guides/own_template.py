"""A guide prompted its own way: its chat template, the base's continuation.

A guide and a base that share token ids may have been trained on different prompt formats. The
guide then reads the conversation as its own template writes it; what follows is the same tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pilotfish.chat import Message, render_prompt
from pilotfish.context import Context, Prompt
from pilotfish.errors import ConfigError, PromptError
from pilotfish.guides.base import Evidence, Step, TokenGuide, reads_base

_NUM_CACHED = 4096  # prompts; sequences that are never released must not pile up


class OwnTemplate:
    """A token guide that is asked about its own prompt ids plus the same continuation ids."""

    def __init__(self, guide: TokenGuide, tokenizer: PreTrainedTokenizerBase) -> None:
        """`tokenizer` shares the base's token ids, and brings the template.

        Raises `ConfigError` without a template, or for a guide that asks the base itself.
        """
        if tokenizer.chat_template is None:
            raise ConfigError(
                "a guide with template 'own' needs a chat template in its folder's tokenizer, "
                "which has none. Save one there, or set template to 'base' in its guide.json."
            )
        if reads_base(guide):
            raise ConfigError(
                "a guide that reads the base's hidden states or asks it about candidates is "
                "prompted as the base is. Set template to 'base' in its guide.json."
            )
        self.needs_hidden = False
        self.guide = guide
        self.tokenizer = tokenizer
        self._prompts: dict[int, tuple[tuple[Message, ...], Prompt]] = {}

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise `PromptError` for a prompt that the guide's template cannot write."""
        self._render(prompt)

    def begin(self, contexts: Sequence[Context]) -> tuple[list[Context], Evidence]:
        """Raises `PromptError` for a prompt without messages."""
        own = [self._translate(context) for context in contexts]
        return own, self.guide.begin(own)

    def tilt(
        self, logprobs_RV: Tensor, step: Step, evidence: tuple[list[Context], Evidence]
    ) -> Tensor:
        own, found = evidence
        return self.guide.tilt(logprobs_RV, replace(step, contexts=own), found)

    def release(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._prompts.pop(key, None)
        self.guide.release(keys)

    def _translate(self, context: Context) -> Context:
        messages, prompt = self._prompts.get(context.key, ((), None))
        if prompt is None or messages != context.prompt.messages:
            prompt = self._render(context.prompt)
            assert prompt.messages is not None
            if len(self._prompts) >= _NUM_CACHED:
                del self._prompts[next(iter(self._prompts))]
            self._prompts[context.key] = prompt.messages, prompt
        continuation = context.token_ids[len(context.prompt.token_ids) :]
        return replace(context, prompt=prompt, token_ids=[*prompt.token_ids, *continuation])

    def _render(self, prompt: Prompt) -> Prompt:
        if prompt.messages is None:
            raise PromptError(
                "a guide is prompted by its own chat template, so it needs the conversation, but "
                "the prompt is text alone. Send messages, or leave the guide out."
            )
        return replace(prompt, token_ids=render_prompt(self.tokenizer, prompt.messages))
