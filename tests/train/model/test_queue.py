import torch
import torch.nn.functional as F

from train.model.queue import Queue

YES, NO = torch.ones(()), torch.zeros(())


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(count))


def test_the_oldest_make_room() -> None:
    """As a list that is appended to and cut, whatever the sizes."""
    queue = Queue(10, 3)
    expected = list(queue.rows.clone())
    for count in (4, 4, 4, 1, 10, 7):
        new = 5 * rows(count)
        queue.push(new, YES)
        expected = (expected + list(F.normalize(new, dim=-1)))[count:]
    torch.testing.assert_close(queue.rows.roll(-int(queue.position), 0), torch.stack(expected))


def test_of_more_rows_than_it_has_the_last_stay() -> None:
    queue = Queue(5, 3)
    queue.push(rows(12), YES)
    torch.testing.assert_close(queue.rows, F.normalize(rows(12)[-5:], dim=-1))


def test_a_refused_push_changes_nothing() -> None:
    queue = Queue(10, 3)
    queue.push(rows(4), YES)
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    queue.push(torch.full((4, 3), float("nan")), NO)
    assert all(torch.equal(value, before[name]) for name, value in queue.state_dict().items())


def test_starts_with_random_rows_of_length_one() -> None:
    queue = Queue(1000, 16)
    torch.testing.assert_close(queue.rows.norm(dim=-1), torch.ones(1000))
    assert queue.rows.mean(0).norm() < 0.1
