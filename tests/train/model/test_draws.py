import numpy as np
import torch
from scipy import stats

from pipeline.random import key_from_seed
from pipeline.random import philox as reference
from train.model.draws import Draws, philox


def draws(step: int = 3, seed: int = 1, ids: range = range(1000)) -> Draws:
    return Draws(seed, step, torch.tensor(list(ids)))


def test_words_are_those_of_the_pipelines_generator() -> None:
    key, ids, blocks = key_from_seed(2**63 + 12345), np.arange(0, 2**32 - 1, 2**28 + 7), np.arange(5)
    expected = reference(key, 4_000_000_000, ids[:, None], 2**31 + 5, blocks)
    found = philox(key, 4_000_000_000, torch.from_numpy(ids)[:, None], 2**31 + 5, torch.from_numpy(blocks))
    assert np.array_equal(found.numpy(), expected)


def test_a_sample_draws_the_same_in_any_batch() -> None:
    whole = draws()
    part = draws(ids=range(500, 510))
    assert torch.equal(whole.uniform("mask", 7)[500:510], part.uniform("mask", 7))
    assert torch.equal(whole.rows(slice(500, 510)).normal("mask", 2, 3), part.normal("mask", 2, 3))


def test_what_is_shared_does_not_depend_on_the_samples() -> None:
    assert torch.equal(draws().shared_normal("slices", 8, 4), draws(ids=range(7, 9)).shared_normal("slices", 8, 4))


def test_every_argument_matters() -> None:
    base = draws().uniform("mask", 4)
    others = [draws(step=4).uniform("mask", 4), draws(seed=2).uniform("mask", 4), draws().uniform("drop", 4)]
    for other in [*others, draws(ids=range(1, 1001)).uniform("mask", 4), draws().shared_uniform("mask", 1000, 4)]:
        assert abs(float(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1])) < 0.06


def test_distributions() -> None:
    uniform, normal = draws().uniform("a", 100).flatten(), draws().normal("b", 100).flatten()
    assert 0 <= uniform.min() <= uniform.max() < 1
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal.numpy(), "norm").pvalue > 1e-3
    assert stats.kstest((1.02 * normal).numpy(), "norm").pvalue < 1e-3  # the test would see 2 %


def test_permutations_are_uniform() -> None:
    orders = draws(ids=range(6000)).permutation("order", 3)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(3).expand(6000, 3))
    counts = torch.bincount(orders @ torch.tensor([9, 3, 1]))
    assert stats.chisquare(counts[counts > 0].numpy()).pvalue > 1e-3
    assert len(counts[counts > 0]) == 6
