"""The main table's numbers, recomputed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from plait.report.summary import _recovered


def recovered(alone, merged=55.0, floor=50.0):
    return _recovered(alone, merged, floor, None, None, None)


def test_a_share_is_given_from_a_gain_of_one_point_on():
    """8 points of 10; and 0.6 of 1.2: a gain of more than a point, if little more, has a share."""
    assert recovered(60.0, 58.0).value == pytest.approx(0.8) and recovered(60.0, 58.0).error is None
    assert recovered(51.2, 50.6).value == pytest.approx(0.5)
    assert recovered(51.0, 51.0).value == 1.0  # one point exactly
    assert recovered(50.99) is None and recovered(50.0) is None and recovered(float("nan")) is None


def test_its_error_leaves_out_resamples_without_a_gain():
    """Gains 10, 5 and 0.4 points: the last is too small to divide by; shares 0.5 and 1.0."""
    floors, alones, mergeds = (np.array(x) for x in ([50.0, 50.0, 50.0], [60.0, 55.0, 50.4], [55.0, 55.0, 70.0]))
    found = _recovered(60.0, 55.0, 50.0, alones, mergeds, floors)
    assert found.value == 0.5
    assert found.error == pytest.approx(np.sqrt((0.25**2 + 0.25**2) / 1))  # of two values, about their mean of 0.75
    assert _recovered(60.0, 55.0, 50.0, alones[1:], mergeds[1:], floors[1:]).error is None  # of one value there is none
