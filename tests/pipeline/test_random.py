import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pipeline.random import key_from_seed, philox, to_integer, to_range, to_unit

# (key, counter, output) of Philox4x32-10, from Random123's published known-answer vectors
KNOWN = [
    ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
def test_known_answers(key: tuple[int, int], counter: tuple[int, ...], expected: str) -> None:
    words = philox(key, *counter)
    assert " ".join(f"{word:08x}" for word in words) == expected


def test_counters_are_broadcast_and_independent_of_their_company() -> None:
    many = philox((1, 2), 3, np.arange(50)[:, None], 7, np.arange(4))
    assert many.shape == (50, 4, 4)
    assert_array_equal(many[31, 2], philox((1, 2), 3, 31, 7, 2))


def test_the_first_call_of_a_process_may_be_for_one_counter() -> None:
    """Where Numba looks at an array's flags, and NumPy warns of those that share memory with a broadcast one."""
    call = "from pipeline.random import philox; philox((1, 2), [3], 4, 5, 6)"
    subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", call], check=True)


def test_every_counter_word_and_key_word_matters() -> None:
    base = philox((1, 2), 3, 4, 5, 6)
    others = [philox((9, 2), 3, 4, 5, 6), philox((1, 9), 3, 4, 5, 6)]
    others += [philox((1, 2), *(9 if i == j else w for j, w in enumerate((3, 4, 5, 6)))) for i in range(4)]
    assert all((other != base).all() for other in others)


def test_key_from_seed_uses_64_bits() -> None:
    assert key_from_seed(0x123456789ABCDEF0) == (0x9ABCDEF0, 0x12345678)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            key_from_seed(seed)


def test_ends_of_the_ranges() -> None:
    ends = np.array([0, 2**32 - 1], dtype=np.uint32)
    assert to_unit(ends)[0] == 0
    assert to_unit(ends)[1] < 1
    assert_array_equal(to_integer(ends, 10), [0, 9])
    assert to_range(ends, 2.0, 4.0)[0] == 2.0
    assert to_range(ends, 2.0, 4.0)[1] < 4.0


def test_integers_are_uniform() -> None:
    from scipy.stats import chisquare

    values = to_integer(philox((5, 6), 0, np.arange(5000), 0, 0).ravel(), 7)
    assert chisquare(np.bincount(values, minlength=7)).pvalue > 0.01
