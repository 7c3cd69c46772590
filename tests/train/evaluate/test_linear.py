import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tests.train.evaluate.test_knn import CPU, clusters
from train.evaluate.linear import Linear


def test_accuracy_is_that_of_scikit_learn() -> None:
    train, test = clusters(400, 0, spread=1.5), clusters(300, 1, spread=1.5)
    scaler = StandardScaler().fit(train.h)
    # scikit-learn minimises the summed loss + |W|^2 / (2 C), ours the mean + weight_decay / 2 |W|^2.
    reference = LogisticRegression(C=1 / (1e-2 * len(train)), max_iter=1000).fit(
        scaler.transform(train.h), train.labels
    )
    expected = 100 * reference.score(scaler.transform(test.h), test.labels)
    found = dict(Linear(weight_decay=1e-2)(train, test, CPU))
    assert found == {"top-1 %": pytest.approx(expected, abs=0.4)}  # one image of 300
    assert 60 < expected < 95


def test_the_weight_decay_is_chosen_on_a_part_of_the_training_set() -> None:
    """Labels of the test set do not matter; an absurd decay is not chosen."""
    train, test = clusters(400, 0, spread=1.5), clusters(300, 1, spread=1.5)
    found = dict(Linear(weight_decay=(1e-2, 100.0))(train, test, CPU))
    assert found["weight decay chosen"] == 1e-2
    assert found["top-1 %"] == dict(Linear(weight_decay=1e-2)(train, test, CPU))["top-1 %"]
    test.labels.zero_()
    assert dict(Linear(weight_decay=(1e-2, 100.0))(train, test, CPU))["weight decay chosen"] == 1e-2
