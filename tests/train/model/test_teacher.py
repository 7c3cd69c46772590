from typing import Any

import torch
from torch import nn

from train.model.teacher import follow, teacher_of


def networks() -> tuple[Any, Any]:
    torch.manual_seed(0)
    student: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = teacher_of(student)
    nn.init.normal_(student[0].weight)
    return teacher, student


def test_it_starts_as_a_copy_without_gradients() -> None:
    student = nn.Linear(3, 4)
    teacher = teacher_of(student)
    assert torch.equal(teacher.weight, student.weight)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_it_moves_by_the_share_of_the_student() -> None:
    teacher, student = networks()
    before = teacher[0].weight.clone()
    follow([(teacher, student)], 0.9, torch.tensor(1.0))
    torch.testing.assert_close(teacher[0].weight, 0.9 * before + 0.1 * student[0].weight)


def test_a_refused_update_leaves_it_as_it_is() -> None:
    teacher, student = networks()
    before = [p.clone() for p in teacher.parameters()]
    follow([(teacher, student)], 0.9, torch.tensor(0.0))
    assert all(torch.equal(p, b) for p, b in zip(teacher.parameters(), before, strict=True))
