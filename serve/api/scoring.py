"""POST /v1/score: what the guided law, the base and reward models say of answers that are there."""

import time
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pilotfish.chat import render_completion
from pilotfish.errors import PromptError
from pilotfish.guides.base import Draft
from serve.api.calls import Calls, all_of, drain
from serve.api.details import finite
from serve.api.journal import Journal
from serve.api.planning import Planner
from serve.api.schema.reading import ScoreRequest
from serve.api.token_text import TokenTexts
from serve.catalog import Catalog
from serve.choosing import choose
from serve.errors import APIError
from serve.wire import Token


class Scoring:
    """One request: its prompt, its guides, and the answers that are read."""

    def __init__(
        self, body: ScoreRequest, catalog: Catalog, planner: Planner, request_id: str
    ) -> None:
        """Raises `APIError`; guides that rewrite answers have no law to read them under."""
        chosen = choose(catalog, body.model, body.asked_guides, request_id=request_id)
        if chosen.chain.revisions:
            message = f"Guide {chosen.chain.revisions[0]!r} rewrites answers, and scores none."
            raise APIError(400, message, param="guides", code="invalid_guides")
        self._model, self._catalog, self._request_id = body.model, catalog, request_id
        self._chosen = chosen
        self._prompt = planner.prompt(body.messages or body.prompt or "", catalog.base)
        self._answers = [self._read(answer, planner.tokenizer) for answer in body.answers]

    async def score(self, calls: Calls, texts: TokenTexts) -> dict[str, Any]:
        """Return the body of the answer. Raises what `Calls` raises."""
        journals = [self._journal(answer) for answer in self._answers]
        await all_of([drain(calls.decode(journal, None)) for journal in journals])
        rewards: dict[str, list[float]] = {}
        if self._chosen.uses:
            rewards = await calls.rewards(self._chosen.uses, self._prompt, self._answers)
        data = []
        for index, journal in enumerate(journals):
            own = {name: found[index] for name, found in rewards.items()}
            reward = next(iter(own.values()), None)
            said = _said(journal.readings, texts)
            data.append(
                {"index": index, "object": "score", "reward": reward, "rewards": own, **said}
            )
        return self._body(data)

    def _body(self, data: list[dict[str, Any]]) -> dict[str, Any]:
        uses = self._chosen.uses
        num_tokens = len(self._prompt.token_ids) + sum(each["num_tokens"] for each in data)
        return {
            "id": f"score-{self._request_id}",
            "object": "list",
            "created": int(time.time()),
            "model": self._model,
            "system_fingerprint": self._catalog.system_fingerprint([use.version for use in uses]),
            "data": data,
            "guides": [
                {"name": use.version.name, "version": use.version.version, "weight": use.weight}
                for use in uses
            ],
            "usage": {
                "prompt_tokens": num_tokens,
                "completion_tokens": 0,
                "total_tokens": num_tokens,
            },
        }

    def _read(self, answer: str | list[int], tokenizer: PreTrainedTokenizerBase) -> Draft:
        """Return an answer as decoding would have drawn it."""
        if not isinstance(answer, str):
            return Draft("", self._checked(answer))
        prompt, ends = self._prompt.text or self._prompt.messages or "", self._catalog.base.end_ids
        try:
            token_ids = render_completion(tokenizer, prompt, answer, end_ids=ends)
        except PromptError as error:
            raise APIError(400, str(error), param="responses") from error
        return Draft(answer, self._checked(token_ids))

    def _checked(self, token_ids: list[int]) -> list[int]:
        size, limit = self._catalog.base.vocab_size, self._catalog.base.max_length
        strange = next((i for i in token_ids if i >= size), None)
        if strange is not None:
            message = f"response token id {strange} is outside the vocabulary of {size}."
            raise APIError(400, message, param="responses")
        num_prompt = len(self._prompt.token_ids)
        if num_prompt + len(token_ids) > limit:
            message = (
                f"A response of {len(token_ids)} tokens behind a prompt of {num_prompt} is longer "
                f"than this model's context of {limit}."
            )
            raise APIError(400, message, param="responses", code="context_length_exceeded")
        return token_ids

    def _journal(self, answer: Draft) -> Journal:
        prompt_ids = self._prompt.token_ids
        return Journal(
            request_id=self._request_id,
            prompt_ids=[*prompt_ids, *answer.token_ids],
            params={"max_tokens": 0, "seed": 0},
            guides=self._chosen.tilts,
            read_from=len(prompt_ids),
        )


def _said(readings: Sequence[Token], texts: TokenTexts) -> dict[str, Any]:
    guided = [finite(token.logprob) for token in readings]
    alone = [finite(token.base_logprob) for token in readings]
    return {
        "num_tokens": len(readings),
        "logprob": sum(guided),
        "base_logprob": sum(alone),
        "kl": sum(token.kl for token in readings),
        "token_ids": [token.token_id for token in readings],
        "tokens": [texts[token.token_id].text for token in readings],
        "token_logprobs": guided,
        "base_token_logprobs": alone,
    }
