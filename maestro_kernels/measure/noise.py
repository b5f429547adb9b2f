"""The one rule for when two measured times differ by more than noise."""

from __future__ import annotations

# Five percent is what repeated medians of one binary differ by on a shared machine.
MARGIN = 0.05
Times = tuple[float, float, float]


def beyond_noise(old: Times, new: Times) -> str:
    """Whether (p20, p50, p80) of `new` is "slower" or "faster" than `old`, or the "same".

    The medians must differ by more than 5 % and by more than the mean of the two spreads
    (p80 - p20) / p50, and the intervals p20..p80 must not meet.
    """
    spread = (old[2] - old[0]) / old[1] + (new[2] - new[0]) / new[1]
    margin = 1 + max(MARGIN, spread / 2)
    ratio = new[1] / old[1]
    if ratio > margin and new[0] > old[2]:
        return "slower"
    if ratio < 1 / margin and new[2] < old[0]:
        return "faster"
    return "same"
