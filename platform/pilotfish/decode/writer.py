"""A causal LM that writes text behind text, with a tokenizer and a decode loop of its own."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from pilotfish.chat import render_prompt
from pilotfish.context import Prompt
from pilotfish.decode.driver import Driver
from pilotfish.decode.engine import Engine
from pilotfish.decode.sequence import FinishReason, Request, SamplingParams
from pilotfish.guides.base import Writing, Written
from pilotfish.models.causal_lm import CausalLM


class Writer:
    """The `TextModel` of this process: everything it is asked for shares one batch."""

    def __init__(
        self, lm: CausalLM, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]
    ) -> None:
        self.max_length = lm.max_length
        self._tokenizer = tokenizer
        engine = Engine(lm, end_ids=end_ids, tokenizer=tokenizer)
        self._driver = Driver(engine, tokenizer)

    def num_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, verbose=False))

    def write(self, writings: Sequence[Writing]) -> list[Written]:
        """Write everything asked for. Raises `PromptError` before any work if one is too long."""
        requests = [self._request(writing) for writing in writings]
        for request in requests:
            self._driver.engine.check(request)
        growing = [self._driver.open(request) for request in requests]
        try:
            for one in growing:
                while not one.ended:
                    self._driver.step()
        finally:
            self._driver.close(growing)
        done = [one.completion() for one in growing]
        return [Written(one.text, one.finish_reason is FinishReason.STOP) for one in done]

    def stream(self, writing: Writing) -> Iterator[str]:
        request = self._request(writing)
        self._driver.engine.check(request)
        return self._driver.follow(request)

    def _request(self, writing: Writing) -> Request:
        prompt = Prompt(render_prompt(self._tokenizer, writing.text), text=writing.text)
        params = SamplingParams(
            temperature=writing.temperature, max_tokens=writing.max_tokens, seed=writing.seed
        )
        return self._driver.request(prompt, params)
