"""Vocabulary fingerprints: do two models mean the same thing by a token id?"""

import hashlib
import json

from transformers import PreTrainedTokenizerBase

from pilotfish.errors import VocabMismatchError


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a short hash of the token-to-id map and of the ids that begin and end text.

    The padding id is left out: it never enters a law, and models of one family often differ in it.
    """
    content = {
        "vocab": sorted(tokenizer.get_vocab().items()),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }
    encoded = json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode()
    return hashlib.sha256(encoded).hexdigest()[:16]


def check_same_vocab(*, base: str, base_vocab: str, guide: str, guide_vocab: str) -> None:
    """Raise `VocabMismatchError` unless two fingerprints agree. Names are for the message."""
    if base_vocab != guide_vocab:
        raise VocabMismatchError(
            f"token guide {guide!r} was trained for vocabulary {guide_vocab}, but base {base!r} "
            f"has {base_vocab}. A token guide must share the base's token ids: train it against "
            "this base, or pick the base named in its guide.json. Guides that work on text go with "
            "any base: response guides (kind `aligner`) and selection (kind `best_of_n`)."
        )
