"""What a corrector reads: a question and an answer to it, put into the text of a template.

Training and decoding both render here, so that a corrector is asked as it was taught. Knows no
tokenizer and no model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pilotfish.chat import PromptInput, check_prompt
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
