import itertools

import pytest

from train.optim.schedule import cosine, scaled_peak, stairs, warmup_cosine


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


def test_a_cosine_ends_where_it_is_told() -> None:
    assert warmup_cosine(100, total_steps=100, warmup_steps=10, peak=2.0, final=0.002) == pytest.approx(0.002)
    assert [cosine(p, 0.04, 0.4) for p in (0, 0.5, 1)] == pytest.approx([0.04, 0.22, 0.4])


def test_stairs_fall_to_a_tenth() -> None:
    falling = [stairs(p, 3.2, [1 / 3, 2 / 3, 8 / 9]) for p in (0, 0.33, 0.34, 0.67, 0.88, 0.9, 1)]
    assert falling == pytest.approx([3.2, 3.2, 0.32, 0.032, 0.032, 0.0032, 0.0032])
