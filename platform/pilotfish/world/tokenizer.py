"""The kitchen's word-level tokenizer and its chat template.

Ids are positions in `VOCABULARY`, so its order is part of every checkpoint: append, never reorder.
"""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from pilotfish.world.scene import DISHES, GUESTS, INGREDIENTS, METHODS, MINUTES, NAMES

SPECIAL_TOKENS = ("<pad>", "<unk>", "<eos>", "<user>", "<bot>", "<fix>")
"""`<fix>` stands between a draft and its correction, for guides that rewrite answers."""

_FRAME = """
i am . my cannot eat have , and how do make ? hello here is one step are two three four five steps
what a lovely question ! ugh fine sorry help with that please ask cook first then finally wash chop
add the it for minutes serve to your leave out be careful pan hot knife sharp even fool can enjoy
good luck
"""

# `dict.fromkeys` keeps the first place of words with two uses: "cook", "two" and "five".
VOCABULARY = tuple(
    dict.fromkeys(
        (
            *SPECIAL_TOKENS,
            *_FRAME.split(),
            *NAMES,
            *GUESTS,
            *INGREDIENTS,
            *DISHES,
            *METHODS,
            *MINUTES,
        )
    )
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if not loop.first %} {% endif -%}
{%- if message.role == 'user' -%}
<user> {{ message.content }}
{%- elif message.role == 'assistant' -%}
<bot> {{ message.content }} <eos>
{%- else -%}
{{ raise_exception('The kitchen knows the roles user and assistant, got ' ~ message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %} <bot>{% endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer; a turn renders as `<user> question <bot> answer <eos>`.

    The rendering of a prompt with `add_generation_prompt=True` is a prefix of its rendering with
    the answer. Decoding joins words by single spaces.
    """
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    backend = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<bot>", "<fix>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,  # it would glue " ." and " ," to the word before
    )
