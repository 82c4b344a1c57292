"""The harmonic mean of base and novel accuracy."""

import pytest

from deltalens.studies.harmonic_mean import harmonic_mean


@pytest.mark.parametrize(
    ("base", "novel", "mean"),
    [(83.2, 76.8, 79.8720), (0.5, 0.5, 0.5), (0.0, 0.9, 0.0), (0.0, 0.0, 0.0), (1.0, 0.5, 2 / 3)],
)
def test_harmonic_mean(base, novel, mean):
    assert harmonic_mean(base, novel) == pytest.approx(mean, abs=1e-4)
    assert harmonic_mean(novel, base) == harmonic_mean(base, novel)


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="at least 0, got -1 and 2"):
        harmonic_mean(-1, 2)
