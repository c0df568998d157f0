"""The peer: the same losses in plain PyTorch (argsort, gather, autograd), written as one would.

Only the benchmark and tests use it; torch is imported when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

EPS = 1e-7


def mse(student: Any, teacher: Any, group_size: int | None = None) -> Any:
    """Sum over elements, mean over the batch; (batch, channel, *space) tensors."""
    del group_size
    return ((student.float() - teacher.float()) ** 2).flatten(1).sum(1).mean()


def lift(student: Any, teacher: Any, group_size: int | None = None) -> Any:
    """LIFT per channel, pixel-space variant."""
    del group_size
    return _lift(student.float().flatten(2)[:, :, None], teacher.float().flatten(2)[:, :, None])


def place(student: Any, teacher: Any, group_size: int) -> Any:
    """PLACE, pixel-space variant."""
    student, teacher = student.float().flatten(2), teacher.float().flatten(2)
    order = ((teacher - student).detach() ** 2).argsort(dim=-1)
    shape = (*student.shape[:2], -1, group_size)
    return _lift(student.gather(-1, order).view(shape), teacher.gather(-1, order).view(shape))


def _lift(student, teacher):
    mean_s, mean_t = student.mean(-1, keepdim=True), teacher.mean(-1, keepdim=True)
    covariance = ((student - mean_s) * (teacher - mean_t)).mean(-1, keepdim=True)
    slope = covariance / (((student - mean_s) ** 2).mean(-1, keepdim=True) + EPS)
    intercept = mean_t - slope * mean_s
    distance = (slope - 1).abs() + intercept.abs()
    weight = 1 - distance.detach().mean().clamp(max=1)
    fine = (teacher - (intercept.detach() + slope.detach() * student)) ** 2
    coarse = student.shape[-1] * distance.sum((1, 2, 3)).mean()
    return coarse + weight * fine.sum((1, 2, 3)).mean()


LOSSES: dict[str, Callable[..., Any]] = {"mse": mse, "lift": lift, "place": place}
