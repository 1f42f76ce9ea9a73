"""How closely others' results must be ours."""

import pytest
import torch

from bench.comparison import close, equal


def test_wrong_results_do_not_pass() -> None:
    a = torch.randn(3, 4)
    close(1e-6)([a], [a])
    equal((a, 1), (a, 1))
    for wrong in (a + 0.1, a.where(a != a[0, 0], float("nan"))):
        with pytest.raises(AssertionError, match="relative RMS"):
            close(1e-3)(wrong, a)
        with pytest.raises(AssertionError):
            equal(wrong, a)
    with pytest.raises(AssertionError, match="is not"):
        close(1.0)(a, a[:1])
