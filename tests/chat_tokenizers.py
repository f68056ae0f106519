"""Three small real tokenizers, each with another way to write a conversation."""

from functools import cache

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from pilotfish.data.bpe import train_byte_bpe

TEXTS = (
    "\n\nHuman: How do I boil an egg?\n\nAssistant: Put it in boiling water for seven minutes.",
    "\n\nHuman: Thanks, and how do I peel it?\n\nAssistant: Cool it first, then roll it gently.",
    "user assistant system You are a careful cook. Naïve café, 12 eggs!",
)

WORD_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<user> ' if message.role == 'user' else '<bot> ' }}{{ message.content }}"
    "{{ ' ' if message.role == 'user' else ' <eos> ' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<bot>{%- endif -%}"
)

CHATML_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, marked turns: `<user> ... <bot> ... <eos>`."""
    marks = ("<pad>", "<unk>", "<eos>", "<user>", "<bot>")
    words = (*marks, "how", "do", "i", "make", "soup", "?", "boil", "it", ".", "good", "luck")
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<bot>"],
        chat_template=WORD_TEMPLATE,
    )


@cache
def hh_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges, HH-RLHF's dialogue."""
    return train_byte_bpe(TEXTS, 400)


@cache
def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges, ChatML: the template writes a newline behind the end token."""
    tokenizer = train_byte_bpe(TEXTS, 400, chat_template=CHATML_TEMPLATE)
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    )
    return tokenizer
