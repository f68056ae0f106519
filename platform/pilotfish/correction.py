"""What a corrector reads: a question and an answer to it, put into the text of a template.

Training and decoding both render here, so that a corrector is asked as it was taught. Knows no
tokenizer and no model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import model_validator

from pilotfish.chat import PromptInput, check_prompt
from pilotfish.config import Config
from pilotfish.errors import ConfigError, PromptError

_PLACEHOLDER = re.compile(r"\{(question|answer)\}")


@dataclass(frozen=True, slots=True)
class CorrectionTemplate:
    """A text with `{question}` and `{answer}` once each; other braces are plain text."""

    text: str

    def __post_init__(self) -> None:
        found = _PLACEHOLDER.findall(self.text)
        if sorted(found) != ["answer", "question"]:
            raise ConfigError(
                f"the correction template {self.text!r} wants {{question}} and {{answer}}, once "
                "each. Write the text that the corrector was trained on."
            )

    def render(self, question: str, answer: str) -> str:
        """Fill in both; braces in them are never placeholders."""
        filled = {"question": question, "answer": answer}
        return _PLACEHOLDER.sub(lambda match: filled[match[1]], self.text)


_TURN = "BEGINNING OF CONVERSATION: USER: {} ASSISTANT:"

TEMPLATES: Mapping[str, CorrectionTemplate] = {
    "paper": CorrectionTemplate(
        _TURN.replace(
            "{}",
            "Editing the following Question-Answer pair to make it more helpful and harmless: "
            "Question: {question} | Answer: {answer}",
        )
    ),
    "released": CorrectionTemplate(
        _TURN.replace(
            "{}",
            "Edit the following Question-Answer pair to make it more helpful and harmless: "
            "{question} | {answer}",
        )
    ),
    "repo": CorrectionTemplate(
        _TURN.replace("{}", "##Question: {question}\n##Answer: {answer}\n##Correction: ")
    ),
}
"""Aligner's three: the paper's, that of the released models, and that of the authors' trainer. They
differ in little, and a model trained on one is worse on the others."""


class TemplateChoice(Config):
    """Which template a corrector was, or is to be, taught with."""

    template: Literal["paper", "released", "repo"] | None = None
    """One of `TEMPLATES`, by its id."""
    template_text: str | None = None
    """A template of its own, with {question} and {answer}."""

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if (self.template is None) == (self.template_text is None):
            raise ValueError(
                "wanted either template (the id of the one it was trained on: "
                f"{', '.join(TEMPLATES)}) or template_text (that text, with {{question}} and "
                "{answer}); an Aligner asked in other words than it was taught corrects badly"
            )
        if self.template_text is not None:
            CorrectionTemplate(self.template_text)
        return self

    @property
    def correction(self) -> CorrectionTemplate:
        if self.template is not None:
            return TEMPLATES[self.template]
        assert self.template_text is not None
        return CorrectionTemplate(self.template_text)


def question_of(prompt: PromptInput) -> str:
    """Return the question that an answer answers, as text.

    Raw text is the question as it stands, and so is the one user message of a conversation. With
    earlier turns it is a transcript, `USER: ...` and `ASSISTANT: ...` line by line, since an answer
    can seldom be corrected without them. System messages instruct the base, and are left out.
    Raises `PromptError` for a conversation in which the user says nothing.
    """
    check_prompt(prompt)
    if isinstance(prompt, str):
        return prompt
    turns = [message for message in prompt if message["role"] != "system"]
    if not turns:
        raise PromptError(
            "the conversation has no user message, so there is no question whose answer could be "
            "revised. Add one, or leave the response guide out."
        )
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role'].upper()}: {turn['content']}" for turn in turns)
