"""A measured profile: latency(N, K, rank, M), steps, break-even, errors, files."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from maestro_kernels.files import check_file, write_text
from maestro_kernels.measure import records
from maestro_kernels.search import curves
from maestro_kernels.search.strategies import AUTO, DENSE, TWO, prepacked
from maestro_kernels.search.targets import Shape

SCHEMA = 1
Key = tuple[str, str, str]  # strategy, cache, launch


@dataclass(frozen=True)
class Point:
    """One time: a strategy at a rank.

    Attributes:
        N: out_features.
        K: in_features.
        M: rows of x.
        bias: whether the layer adds one.
        rank: of the factors; 0 stands for the dense layer.
        strategy: as strategies.py names it: "dense", "two matmuls", "ours", "native: fused", ...
        cache: "warm" repeats one set of tensors, "cold" walks through copies.
        launch: "eager" or "graph" (CUDA graph).
        p20: milliseconds per call, 20th percentile.
        p50: median.
        p80: 80th percentile.
    """

    N: int
    K: int
    M: int
    bias: bool
    rank: int
    strategy: str
    cache: str
    launch: str
    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Estimate:
    """A latency and where it comes from.

    Attributes:
        ms: milliseconds per call.
        source: "measured", "interpolated" (this size at other ranks or M), "fitted" (other sizes).
    """

    ms: float
    source: str


@dataclass(frozen=True)
class Errors:
    """Relative errors on points that a prediction did not see: |predicted / measured - 1|.

    Attributes:
        median: of all points.
        p90: 90th percentile.
        count: points held out.
    """

    median: float
    p90: float
    count: int


@dataclass(frozen=True)
class Profile:
    """Latency over rank of some layer sizes on one device, in milliseconds.

    Attributes:
        device: kind, name, arch and cores (threads) of the device.
        versions: hardware.versions() when it was measured.
        dtype: dtype name.
        points: every measured time.
        shapes: the sizes asked for, with the layers of the model that have them.
        chosen: the low-rank strategy that counts where none is named; see `using`.
    """

    device: dict[str, Any]
    versions: dict[str, Any]
    dtype: str
    points: tuple[Point, ...]
    shapes: tuple[Shape, ...]
    chosen: str = AUTO

    def using(self, strategy: str) -> Profile:
        """The same measurements seen by someone who runs another strategy, say "prepacked".

        Raises:
            ValueError: it was not measured.
        """
        if strategy not in self.strategies:
            raise ValueError(
                f"using: strategy: expected one of {self.strategies}, got {strategy!r}"
            )
        return replace(self, chosen=strategy)

    # --- questions -----------------------------------------------------------------------------

    def latency(
        self,
        *,
        N: int,
        K: int,
        rank: int | str | None,
        M: int = 1,
        strategy: str | None = None,
        cache: str = "cold",
        launch: str | None = None,
    ) -> float:
        """Milliseconds of one call of a layer.

        A measured size is interpolated in rank (straight lines) and in M (on logarithmic axes);
        another size gets the fitted model (`errors` says how far off it is). Rank 0 costs what the
        smallest rank does.

        Args:
            N: out_features.
            K: in_features.
            rank: of the factors; None or "dense" is the dense layer.
            M: rows of x.
            strategy: as in `strategies`; None is what a layer runs: "ours" (see `using`), or
                "dense".
            cache: "cold", as in a model whose other layers ran in between, or "warm".
            launch: "eager" or "graph"; None is "graph" where it was measured.

        Raises:
            ValueError: a size below 1, or nothing measured for this strategy, cache or launch.
        """
        return self.estimate(
            N=N, K=K, rank=rank, M=M, strategy=strategy, cache=cache, launch=launch
        ).ms

    def estimate(
        self,
        *,
        N: int,
        K: int,
        rank: int | str | None,
        M: int = 1,
        strategy: str | None = None,
        cache: str = "cold",
        launch: str | None = None,
    ) -> Estimate:
        """`latency` with its source; the same arguments and errors."""
        dense = rank is None or rank == "dense"
        if not dense and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 0):
            raise ValueError(f"latency: rank: expected None, 'dense' or >= 0, got {rank!r}")
        if min(N, K, M) < 1:
            raise ValueError(f"latency: N, K, M: expected sizes >= 1, got {(N, K, M)}")
        key = (strategy or (DENSE if dense else self.main), cache, launch or self.launch)
        if key not in self._curves:
            raise ValueError(
                f"latency: strategy, cache, launch: expected one of {sorted(self._curves)}, "
                f"got {key}"
            )
        r = 0 if dense else max(int(rank or 0), 1)
        Ms = self.batch_sizes
        known = (N, K) in self._curves[key]
        if M in Ms:
            return self._at(key, N, K, r, M)
        source = "interpolated" if known else "fitted"
        return Estimate(curves.over_rows(M, Ms, lambda m: self._at(key, N, K, r, m).ms), source)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The measured M."""
        return tuple(sorted({p.M for p in self.points}))

    @property
    def strategies(self) -> tuple[str, ...]:
        """What has times, "dense" included; "prepacked" is the fastest form of `prepack`."""
        return tuple(dict.fromkeys(strategy for strategy, _, _ in self._curves))

    @property
    def keys(self) -> set[Key]:
        """(strategy, cache, launch) of all times."""
        return set(self._curves)

    @cached_property
    def launch(self) -> str:
        """The launch mode that counts: device time where it was measured."""
        return "graph" if any(p.launch == "graph" for p in self.points) else "eager"

    @cached_property
    def main(self) -> str:
        """The low-rank strategy that counts: what auto runs, unless another was chosen."""
        return self.chosen if self.chosen in self.strategies else TWO

    def curve(
        self,
        *,
        N: int,
        K: int,
        M: int,
        strategy: str | None = None,
        cache: str = "cold",
        launch: str | None = None,
    ) -> dict[int, curves.Knot]:
        """Rank -> measured time of one size, without the probe of an odd rank."""
        key = (strategy or self.main, cache, launch or self.launch)
        points = self._curves.get(key, {}).get((N, K), {}).get(M, [])
        return curves.curve_of(points)

    def break_even(self, *, N: int, K: int, M: int, cache: str = "cold") -> float | None:
        """The rank up to which low rank is faster than the dense layer, as measured.

        None where it never is, infinite where it is at every measured rank. NK / (N + K) is where
        the two do the same number of operations.
        """
        curve = self.curve(N=N, K=K, M=M, cache=cache)
        return curves.break_even(curve, self.latency(N=N, K=K, rank="dense", M=M, cache=cache))

    def steps(self, *, N: int, K: int, M: int, cache: str = "cold") -> list[curves.Step]:
        """Jumps of the curve; `.rank` is just below each."""
        return curves.steps(self.curve(N=N, K=K, M=M, cache=cache))

    def preferred(self, *, N: int, K: int, M: int, cache: str = "cold") -> list[int]:
        """Measured ranks that are worth choosing: faster than dense and than every larger rank."""
        dense = self.latency(N=N, K=K, rank="dense", M=M, cache=cache)
        curve = self.curve(N=N, K=K, M=M, cache=cache)
        return [r for r in curves.preferred(curve) if curve[r].ms < dense]

    def odd_penalty(self, *, N: int, K: int, M: int, cache: str = "cold") -> float:
        """How many times as long a rank off the grid of 8 takes; 1 where none was measured."""
        key = (self.main, cache, self.launch)
        return curves.odd_penalty(self._curves.get(key, {}).get((N, K), {}).get(M, []))

    @cached_property
    def errors(self) -> dict[str, Errors]:
        """Held-out errors: "interpolation" (a rank left out), "fit" (a whole size left out).

        "fit" is missing with fewer than three sizes.
        """
        rank_errors: list[float] = []
        size_errors: list[float] = []
        for strategy in (DENSE, self.main):
            key = (strategy, "cold", self.launch)
            for M in self.batch_sizes:
                samples = self._samples(key, M)
                size_errors += curves.left_out_shapes(samples)
                for by_M in self._curves.get(key, {}).values():
                    rank_errors += curves.left_out(curves.curve_of(by_M.get(M, [])))
        found = {"interpolation": rank_errors, "fit": size_errors}
        return {
            name: Errors(float(np.median(e)), float(np.quantile(e, 0.9)), len(e))
            for name, e in found.items()
            if e
        }

    # --- how a time comes about ----------------------------------------------------------------

    @cached_property
    def _curves(self) -> dict[Key, dict[tuple[int, int], dict[int, list[Point]]]]:
        """(strategy, cache, launch) -> (N, K) -> M -> points."""
        found: dict[Key, dict[tuple[int, int], dict[int, list[Point]]]] = {}
        for p in (*self.points, *prepacked(self.points)):
            sizes = found.setdefault((p.strategy, p.cache, p.launch), {})
            sizes.setdefault((p.N, p.K), {}).setdefault(p.M, []).append(p)
        return found

    @cached_property
    def _fits(self) -> dict[tuple[Key, int], curves.Fit | None]:
        return {}

    def _samples(self, key: Key, M: int) -> list[curves.Sample]:
        sizes = self._curves.get(key, {})
        return [(p.N, p.K, p.rank, p.p50) for by_M in sizes.values() for p in by_M.get(M, [])]

    def _at(self, key: Key, N: int, K: int, rank: int, M: int) -> Estimate:
        """At an M that was measured."""
        points = self._curves[key].get((N, K), {}).get(M)
        if not points:
            return Estimate(self._fitted(key, M).ms(N, K, rank), "fitted")
        for p in points:
            if p.rank == rank:
                return Estimate(p.p50, "measured")
        curve = curves.curve_of(points)
        ms = curves.interpolate(curve, rank)
        if rank % curves.GRID:
            ms *= curves.odd_penalty(points)
        return Estimate(ms, "interpolated")

    def _fitted(self, key: Key, M: int) -> curves.Fit:
        if (key, M) not in self._fits:
            self._fits[key, M] = curves.fit(self._samples(key, M))
        model = self._fits[key, M]
        if model is None:
            raise ValueError(f"latency: strategy: expected one measured at M {M}, got {key[0]!r}")
        return model

    # --- files ---------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON: complete, or not at all."""
        place = check_file("Profile.save", "path", path)
        head = {
            "schema": SCHEMA,
            "device": self.device,
            "versions": self.versions,
            "dtype": self.dtype,
            "shapes": [asdict(shape) for shape in self.shapes],
        }
        write_text(place, records.document(head, "points", map(asdict, self.points)))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read and check a saved profile.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no profile of this schema; says what was expected and what came.
        """
        where = f"Profile.load: {Path(path).name}"
        fields = ("device", "versions", "dtype", "shapes", "points")
        record = records.load_document(
            path, fields, schema=SCHEMA, what="profile", fn="Profile.load"
        )
        try:
            points = tuple(point_from(p) for p in record["points"])
            shapes = tuple(records.checked(Shape, s, "shape") for s in record["shapes"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: expected points and shapes, got {error}") from None
        if not points:
            raise ValueError(f"{where}: points: expected at least one, got none")
        return cls(record["device"], record["versions"], record["dtype"], points, shapes)

    def __str__(self) -> str:
        lines = [f"{self.device['name']}, {self.device['num_cores']} cores, {self.dtype}"]
        for shape in self.shapes:
            for M in self.batch_sizes:
                N, K = shape.N, shape.K
                dense = self.latency(N=N, K=K, rank="dense", M=M)
                limit = break_even_text(self.break_even(N=N, K=K, M=M))
                curve = self.curve(N=N, K=K, M=M)
                times = ", ".join(f"{rank}: {knot.ms:.4g}" for rank, knot in curve.items())
                lines.append(
                    f"{M} · {shape.K}→r→{shape.N}: dense {dense:.4g} ms, break-even {limit}; "
                    f"rank: ms {times}"
                )
        return "\n".join(lines)


def point_from(record: dict[str, Any]) -> Point:
    """A Point from its dictionary.

    Raises:
        ValueError: fields are missing or of another kind.
    """
    point = records.checked(Point, record, "point")
    if not 0 < point.p20 <= point.p50 <= point.p80:
        raise ValueError(f"p50: expected 0 < p20 <= p50 <= p80, got {record}")
    return point


def break_even_text(rank: float | None) -> str:
    """A measured break-even rank in words."""
    if rank is None:
        return "never"
    return "beyond all ranks" if math.isinf(rank) else f"rank {rank:.0f}"
