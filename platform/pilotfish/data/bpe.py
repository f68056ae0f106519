"""A small byte-level BPE tokenizer, for bases trained from nothing on a data set."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pilotfish.errors import ConfigError

HH_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content | trim }}"
    "{%- elif message.role == 'user' -%}{{ '\n\nHuman: ' + message.content | trim }}"
    "{%- else -%}{{ '\n\nAssistant: ' + message.content | trim + eos_token }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\n\nAssistant:' }}{%- endif -%}"
)
r"""HH-RLHF's dialogue as a chat template: "\n\nHuman: ...\n\nAssistant: ...<eos>".

The generation prompt ends at the colon, so an answer begins with its space, as words inside a text
do. Every assistant turn ends with the end token, so what a model read and wrote is the beginning of
the next turn's prompt.
"""

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"


def train_byte_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    chat_template: str | None = HH_TEMPLATE,
    max_length: int | None = None,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with ids 0 `<pad>` and 1 `<eos>`; the same texts give the same ids.

    Any text can be encoded and comes back unchanged. The vocabulary is smaller than `vocab_size`
    when the texts hold too few distinct pairs. Raises `ConfigError`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [PAD_TOKEN, EOS_TOKEN]
    if vocab_size < len(alphabet) + len(specials):
        raise ConfigError(
            f"vocab_size is {vocab_size}, but a byte-level vocabulary needs at least "
            f"{len(alphabet) + len(specials)}: all bytes and {specials}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
        **({} if max_length is None else {"model_max_length": max_length}),
    )
    wrapped.chat_template = chat_template
    return wrapped
