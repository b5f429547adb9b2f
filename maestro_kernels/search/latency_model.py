"""A fitted latency model: what a layer of a size that was not measured takes, at a measured M.

ms = c0 + c1 r K + c2 r N + c3 K + c4 N     low rank r
ms = c0 + c1 N K + c2 K + c3 N              dense

with coefficients >= 0: work, bytes of the factors and of x and y, a fixed cost per call. One fit
per strategy, cache state, launch mode and M: the cost of a product changes with M in steps that no
line follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Fit", "fit", "left_out_shapes"]

Sample = tuple[int, int, int, float]  # N, K, rank (0 is dense), ms


@dataclass(frozen=True)
class Fit:
    """Coefficients of the formula above; `dense` says which of the two."""

    coefficients: tuple[float, ...]
    dense: bool

    def ms(self, N: int, K: int, rank: int) -> float:
        """Predicted milliseconds."""
        return float(_features(N, K, rank, self.dense) @ np.array(self.coefficients))


def _features(N: int, K: int, rank: int, dense: bool) -> np.ndarray:
    if dense:
        return np.array([1.0, N * K, K, N])
    return np.array([1.0, rank * K, rank * N, K, N])


def fit(samples: Sequence[Sample]) -> Fit | None:
    """Least squares of the relative error with coefficients >= 0; None without samples.

    The samples are all dense (rank 0) or all low rank.
    """
    if not samples:
        return None
    dense = samples[0][2] == 0
    rows = np.array([_features(N, K, r, dense) / ms for N, K, r, ms in samples])
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    found = _nonnegative(rows / scale, np.ones(len(samples)))
    return Fit(tuple(float(c) for c in found / scale), dense)


def _nonnegative(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Minimise |A c - b| over c >= 0 (Lawson and Hanson, 1974)."""
    n = A.shape[1]
    c, passive = np.zeros(n), np.zeros(n, dtype=bool)
    for _ in range(3 * n):
        gradient = A.T @ (b - A @ c)
        free = ~passive & (gradient > 1e-10)
        if not free.any():
            break
        passive[np.argmax(np.where(free, gradient, -np.inf))] = True
        while True:
            trial = np.zeros(n)
            trial[passive] = np.linalg.lstsq(A[:, passive], b, rcond=None)[0]
            bad = passive & (trial <= 0)
            if not bad.any():
                c = trial
                break
            # Go as far towards the trial as no coefficient turns negative, and drop what reached 0.
            steps = c[bad] / np.maximum(c[bad] - trial[bad], 1e-300)
            c = c + float(steps.min()) * (trial - c)
            passive &= c > 1e-12
            c[~passive] = 0.0
            if not passive.any():
                break
    return c


def left_out_shapes(samples: Sequence[Sample]) -> list[float]:
    """Relative error at each sample of a fit that saw no sample of that shape.

    Empty where fewer than three shapes were measured: two points make no line.
    """
    shapes = sorted({(N, K) for N, K, _, _ in samples})
    if len(shapes) < 3:
        return []
    errors = []
    for shape in shapes:
        model = fit([s for s in samples if s[:2] != shape])
        for N, K, rank, ms in samples:
            if model is not None and shape == (N, K):
                errors.append(abs(model.ms(N, K, rank) / ms - 1))
    return errors
