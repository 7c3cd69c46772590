import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tests.train.evaluate.test_knn import clusters
from train.evaluate.knn import accuracy
from train.evaluate.linear import linear_predict


def test_agrees_with_scikit_learn() -> None:
    train, test = clusters(400, 0, spread=1.5), clusters(300, 1, spread=1.5)
    scaler = StandardScaler().fit(train.h)
    # scikit-learn minimises the summed loss + |W|^2 / (2 C), ours the mean + weight_decay / 2 |W|^2.
    reference = LogisticRegression(C=1 / (1e-2 * len(train)), max_iter=1000).fit(
        scaler.transform(train.h), train.labels
    )
    expected = torch.from_numpy(reference.predict(scaler.transform(test.h)))
    predicted = linear_predict(train, test, weight_decay=1e-2)
    assert (predicted == expected).float().mean() > 0.99
    assert accuracy(predicted, test.labels) > 60
