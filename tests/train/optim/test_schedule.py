import itertools

import pytest

from train.optim.schedule import scaled_peak, warmup_cosine


def rates(total: int, warmup: int) -> list[float]:
    return [warmup_cosine(s, total_steps=total, warmup_steps=warmup, peak=2.0) for s in range(total + 1)]


def test_warms_up_linearly_then_falls_to_zero() -> None:
    values = rates(100, 10)
    assert values[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert values[10] == 2.0
    assert values[55] == pytest.approx(1.0)
    assert values[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))


def test_without_warmup_starts_at_the_peak() -> None:
    assert rates(10, 0)[0] == 2.0


def test_scaling_rules() -> None:
    assert scaled_peak(0.3, 4096, "linear") == pytest.approx(4.8)
    assert scaled_peak(0.075, 4096, "sqrt") == pytest.approx(4.8)
