"""Counted randomness: every draw is a function of (request, position, purpose).

Nothing is streamed, so a request samples the same path whichever replica continues it, whatever
else is in its batch, and however often it is replayed. The generator is Philox4x32 with ten rounds
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), on all rows at once.

Shapes: R rows, V vocabulary, K blocks of the vocabulary, N entries of one level of a sum.
"""

import hashlib
from collections.abc import Sequence
from enum import IntEnum, unique

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 256

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


@unique
class Purpose(IntEnum):
    """What a draw decides; draws for different purposes never share a counter."""

    SAMPLE = 0
    DRAFT = 1
    """The token a drafter proposes."""
    ACCEPT = 2
    """Whether it is taken."""
    RESIDUAL = 3
    """What is drawn where it is not."""
    ROLLOUT = 4
    """A token of a continuation that only values a candidate."""
    SELECT = 5
    """Which of several drafts goes on."""


def request_key(seed: int, prompt_ids: Sequence[int]) -> int:
    """Return the 64-bit Philox key of a request.

    The prompt enters, so that one seed over many prompts gives independent samples.
    """
    digest = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8)
    digest.update(np.asarray(prompt_ids, dtype="<i8").tobytes())
    return int.from_bytes(digest.digest(), "little")


def draft_seed(seed: int, number: int) -> int:
    """Return the seed of a request's draft; draft 0 has the request's own.

    It does not depend on how many drafts there are, so more drafts only add to fewer.
    """
    return _derived(seed, number, b"draft")


def choice_seed(seed: int, number: int) -> int:
    """Return the seed of one of a request's choices; choice 0 has the request's own.

    No draft of any choice shares it: choices are independent, whatever selects among their drafts.
    """
    return _derived(seed, number, b"choice")


def _derived(seed: int, number: int, purpose: bytes) -> int:
    if number == 0:
        return seed
    digest = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8, person=purpose)
    digest.update(number.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def uniforms(
    keys: NDArray[np.uint64], positions: NDArray[np.uint64], purpose: Purpose | NDArray[np.uint64]
) -> NDArray[np.float64]:
    """One uniform in [0, 1) per row, with 53 random bits; each row may have its own purpose."""
    counter = (
        positions & _LOW,
        positions >> _WORD,
        np.full_like(positions, purpose),
        np.zeros_like(positions),
    )
    words = philox(counter, (keys & _LOW, keys >> _WORD))
    high, low = words[0] >> np.uint64(5), words[1] >> np.uint64(6)
    return ((high * 67108864.0 + low) * 2.0**-53).astype(np.float64)


def philox(
    counter: tuple[NDArray[np.uint64], ...], key: tuple[NDArray[np.uint64], ...]
) -> tuple[NDArray[np.uint64], ...]:
    """Philox4x32-10: four 32-bit words per row from a 128-bit counter and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> _WORD) ^ c1 ^ k0,
            p1 & _LOW,
            (p0 >> _WORD) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def invert_cdf(probs_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """Return, per row, the token at which the cumulative sum of `probs` passes `uniform`.

    `probs` need not sum to one. A token of probability zero is never returned. Two levels (blocks,
    then within a block) keep the sums short: exact in float32 for large vocabularies, and faster
    than a full cumulative sum.
    """
    num_rows, vocab_size = probs_RV.shape
    padded = -(-vocab_size // _BLOCK) * _BLOCK
    if padded != vocab_size:
        probs_RV = torch.nn.functional.pad(probs_RV, (0, padded - vocab_size))
    blocks_RKB = probs_RV.view(num_rows, -1, _BLOCK)
    block_R, rest_R = _pass(blocks_RKB.sum(-1), uniforms_R.double(), relative=True)
    inside_RB = blocks_RKB[torch.arange(num_rows, device=probs_RV.device), block_R]
    token_R, _ = _pass(inside_RB, rest_R, relative=False)
    return block_R * _BLOCK + token_R


def _pass(mass_RN: Tensor, target_R: Tensor, *, relative: bool) -> tuple[Tensor, Tensor]:
    """Where the running sum passes the target, and what is left of the target there."""
    running_RN = mass_RN.double().cumsum(-1)
    total_R = running_RN[:, -1]
    wanted_R = target_R * total_R if relative else target_R
    # Rounding may push the target up to the total, behind the last token of positive probability.
    wanted_R = torch.minimum(wanted_R, total_R * (1 - 2.0**-52))
    at_R = torch.searchsorted(running_RN, wanted_R[:, None], right=True)[:, 0]
    before_R = torch.where(
        at_R > 0, running_RN.gather(1, (at_R - 1).clamp_min(0)[:, None])[:, 0], 0
    )
    return at_R, wanted_R - before_R
