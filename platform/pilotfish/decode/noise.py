"""Counted randomness: every draw is a function of (request, position, purpose).

Nothing is streamed, so a request samples the same path whichever replica continues it, whatever
else is in its batch, and however often it is replayed. The generator is Philox4x32 with ten rounds
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), on all rows at once.
"""

import hashlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


class Purpose(IntEnum):
    """What a draw decides; draws for different purposes never share a counter."""

    SAMPLE = 0


def request_key(seed: int, prompt_ids: Sequence[int]) -> int:
    """Return the 64-bit Philox key of a request.

    The prompt enters, so that one seed over many prompts gives independent samples.
    """
    digest = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8)
    digest.update(np.asarray(prompt_ids, dtype="<i8").tobytes())
    return int.from_bytes(digest.digest(), "little")


def uniforms(
    keys: NDArray[np.uint64], positions: NDArray[np.uint64], purpose: Purpose
) -> NDArray[np.float64]:
    """One uniform in [0, 1) per row, with 53 random bits."""
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
