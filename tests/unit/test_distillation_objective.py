"""Output and feature distillation (eqs. 6-8), recomputed in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.objectives.distillation import feature_distillation, knowledge_distillation, output_distillation

RNG = np.random.default_rng(0)
STUDENT = [RNG.normal(size=(2, 4, 8, 8)), RNG.normal(size=(2, 6, 4, 4))]
TEACHER = [RNG.normal(size=(2, 4, 8, 8)), RNG.normal(size=(2, 6, 4, 4))]


def tensors(arrays: list[np.ndarray], scales: tuple[float, float] = (1.0, 1.0)) -> list[Tensor]:
    return [torch.from_numpy(scale * array) for scale, array in zip(scales, arrays, strict=True)]


def test_output_distillation_is_a_mean_square() -> None:
    found = output_distillation(*tensors([STUDENT[0], TEACHER[0]]))
    assert float(found) == pytest.approx(((STUDENT[0] - TEACHER[0]) ** 2).mean())


def test_feature_distillation_is_relative_to_the_teachers_power() -> None:
    expected = sum(((s - t) ** 2).sum() / (t**2).sum() for s, t in zip(STUDENT, TEACHER, strict=True))
    assert float(feature_distillation(tensors(STUDENT), tensors(TEACHER))) == pytest.approx(expected)


def test_feature_distillation_is_free_of_each_layers_scale() -> None:
    plain = feature_distillation(tensors(STUDENT), tensors(TEACHER))
    scales = (300.0, 0.02)
    assert float(feature_distillation(tensors(STUDENT, scales), tensors(TEACHER, scales))) == pytest.approx(float(plain))


def test_no_loss_where_the_student_is_the_teacher_and_two_per_layer_for_a_stranger() -> None:
    assert float(feature_distillation(tensors(TEACHER), tensors(TEACHER))) == 0
    assert float(feature_distillation(tensors(TEACHER, (-1.0, 0.0)), tensors(TEACHER))) == pytest.approx(4 + 1)


def test_a_silent_layer_of_the_teacher_does_not_divide_by_zero() -> None:
    silent = [torch.zeros(1, 2, 4, 4)]
    assert float(feature_distillation(silent, silent)) == 0


def test_layers_must_pair_up() -> None:
    with pytest.raises(ValueError, match="1 student features but 2 teacher features"):
        feature_distillation(tensors(STUDENT)[:1], tensors(TEACHER))


def test_knowledge_distillation_is_the_weighted_sum() -> None:
    assert float(knowledge_distillation(torch.tensor(2.0), torch.tensor(3.0), 0.5)) == 3.5
