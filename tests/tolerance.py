"""The one place with tolerances.

A result may be wrong by at most twice what plain torch is wrong by in the same dtype, plus the
rounding of its own format.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(actual: Tensor, expected: Tensor, baseline: Tensor, name: str = "result") -> None:
    """Checks floats of a verb.

    Parameters
    ----------
    actual : what the verb gave
    expected : the float64 reference
    baseline : the same by plain torch in the inputs' dtype
    """
    assert actual.shape == expected.shape == baseline.shape, (name, actual.shape, expected.shape)
    epsilon = torch.finfo(actual.dtype).eps
    actual, expected, baseline = (x.detach().cpu().double() for x in (actual, expected, baseline))
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    finite = actual.isfinite() & expected.isfinite()
    _fail_at(
        (~(same | finite)).double(), 0.5, actual, expected, f"{name}: inf or NaN in other places"
    )
    if not finite.any():
        return
    error = torch.where(finite, actual - expected, 0.0).abs()
    allowed = torch.where(finite & baseline.isfinite(), baseline - expected, 0.0).abs().max() * 2
    allowed = float(allowed + epsilon * expected[finite].abs().max())
    _fail_at(error, allowed, actual, expected, f"{name}: error above {allowed:.3g}")
    distance = _cosine_distance(actual[finite], expected[finite])
    bound = 2 * _cosine_distance(baseline[finite], expected[finite]) + epsilon
    assert not distance > bound, (
        f"{name}: cosine distance {distance:.3g}, at most {bound:.3g} allowed"
    )


def _fail_at(
    badness: Tensor, allowed: float, actual: Tensor, expected: Tensor, message: str
) -> None:
    if badness.numel() and float(badness.max()) > allowed:
        worst = tuple(int(i) for i in torch.unravel_index(badness.argmax(), badness.shape))
        both = f"got {actual[worst]}, expected {expected[worst]}"
        raise AssertionError(f"{message}, worst at {worst}: {both}")


def _cosine_distance(a: Tensor, b: Tensor) -> float:
    norm = float(a.norm() * b.norm())
    return 1.0 - float(a.flatten() @ b.flatten()) / norm if norm else 0.0
