"""Counted noise: known answers, uniformity, and dependence on exactly its three arguments."""

import numpy as np
import pytest

from pilotfish.noise import Purpose, philox, request_key, uniforms


def words(*values: int) -> tuple[np.ndarray, ...]:
    return tuple(np.array([value], dtype=np.uint64) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    result = philox(words(*counter), words(*key))
    assert tuple(int(word[0]) for word in result) == expected


def test_uniforms_are_uniform_over_keys_and_over_positions() -> None:
    many = np.arange(20_000, dtype=np.uint64)
    one = np.full_like(many, 5)
    for keys, positions in ((many, one), (one, many)):
        drawn = uniforms(keys, positions, Purpose.SAMPLE)
        counts = np.bincount((drawn * 50).astype(int), minlength=50)
        chi_square = ((counts - 400.0) ** 2 / 400.0).sum()
        assert chi_square < 85.4  # 49 degrees of freedom: one chance in a thousand
        assert (drawn >= 0).all()
        assert (drawn < 1).all()


def test_a_row_draws_the_same_whatever_its_neighbours() -> None:
    keys = np.array([11, 2**63 + 5, 3], dtype=np.uint64)
    positions = np.array([0, 9, 2**33], dtype=np.uint64)
    together = uniforms(keys, positions, Purpose.SAMPLE)
    alone = [uniforms(keys[i : i + 1], positions[i : i + 1], Purpose.SAMPLE)[0] for i in range(3)]
    assert together.tolist() == alone


def test_request_key_depends_on_seed_and_prompt() -> None:
    keys = {request_key(seed, ids) for seed in (0, 1) for ids in ([1, 2], [2, 1], [1, 2, 0])}
    assert len(keys) == 6
    assert request_key(1, [1, 2]) == request_key(1, (1, 2))
