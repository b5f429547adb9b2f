"""What calls of one kind were fastest by when a call first met them: the memory of `first use`.

Calls of one kind share a bucket: the same sizes but for M and rank, which are rounded up. Times are
kept in the user's cache folder, one file for each device and its software, so that a later process
starts with them; a table that `maestro-kernels tune` made goes before them. ops/first_use.py
measures.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from maestro_kernels import hardware, tables
from maestro_kernels.backends import native
from maestro_kernels.measure import records
from maestro_kernels.tables import BASELINE

if TYPE_CHECKING:
    from maestro_kernels.problem import LoDProblem

# What MAESTRO_KERNELS_TUNE may be; the last is the default.
TUNING = ("off", "table", "first-use")
# All M above share one bucket: what is fastest there is fastest beyond.
_MAX_M = {"cpu": 4096, "cuda": 16384}
# Two matmuls stay unless another strategy takes this much less than they do.
_GAIN = 0.98

_chosen: str | None = None


@dataclass(frozen=True)
class Measured:
    """Times of one kind of call.

    Attributes:
        bucket: the kind, as `bucket` names it.
        us: "backend: strategy" -> microseconds for one call.
    """

    bucket: str
    us: dict[str, float]

    @property
    def winner(self) -> str:
        """The strategy with the least time; two matmuls unless one clearly beats them."""
        best = min(self.us, key=lambda name: (self.us[name], name))
        two = self.us.get(BASELINE, float("inf"))
        return best if self.us[best] < _GAIN * two else BASELINE

    def __str__(self) -> str:
        gain = self.us[BASELINE] / self.us[self.winner]
        verdict = "nothing beat two matmuls" if self.winner == BASELINE else (
            f"{gain:.2f} times as fast as two matmuls"
        )  # fmt: skip
        return f"measured here at first use ({self.bucket}): {verdict}"


def tuning() -> str:
    """What may decide beside the fixed rules: one of TUNING.

    Raises:
        ValueError: MAESTRO_KERNELS_TUNE is something else.
    """
    if _chosen is not None:
        return _chosen
    given = os.environ.get("MAESTRO_KERNELS_TUNE", "") or TUNING[-1]
    return check_tuning("MAESTRO_KERNELS_TUNE", given)


def check_tuning(name: str, value: Any) -> str:
    """A value of TUNING."""
    if value not in TUNING:
        raise ValueError(f"{name}: expected one of {', '.join(TUNING)}, got {value!r}")
    return str(value)


def set_tuning(value: str | None) -> None:
    """Let `tuning` return this; None is what the environment says. Plans are dispatch.py's."""
    global _chosen
    _chosen = value


def chosen() -> str | None:
    """What `set_tuning` was last given."""
    return _chosen


def bucket(group: Sequence[LoDProblem], mode: tables.Mode, *, shared_x: bool) -> str:
    """The kind of call, in words that are also its key."""
    first = group[0]
    on_gpu = first.device.type == "cuda"
    M = max(p.M for p in group)
    M = min(1 << max(M - 1, 0).bit_length(), _MAX_M.get(first.device.type, 4096))
    words = [f"{mode} {tables.dtype_key(first.dtype)} M≤{M}"]
    for p in group:
        rank = f"r≤{p.R}, a tensor" if p.rank is None else f"r≤{_rounded(p.rank)}"
        # Library kernels of a GPU are others where rows do not start on 16 bytes.
        odd = (
            " odd"
            if on_gpu and (not p.aligned or (p.max_active_rank | p.R | p.K | p.N) % 8)
            else ""
        )
        copied = " strided x" if p.x_stride and p.x_stride[-1] != 1 and p.K > 1 else ""
        bias, activation = (
            " + bias" if p.has_bias else "",
            f" {p.activation}" if p.activation else "",
        )
        added = (" + residual" if p.has_residual else "") + (" scaled" if p.is_scaled else "")
        added += " normed" if p.has_norm else ""
        words.append(f"{p.K}→{p.N} {rank}{bias}{added}{activation}{odd}{copied}")
    if len(group) > 1 and not shared_x:
        words.append("one x each")
    return "; ".join(words)


def _rounded(rank: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, ... that is no less."""
    power = 1 << max(rank - 1, 0).bit_length()
    return 3 * power // 4 if power >= 4 and rank <= 3 * power // 4 else power


class _Memory:
    """Times measured on one device, and where they are kept.

    Attributes:
        found: bucket -> times.
        given: those that a user put here (`use_choices`, `tune`).
    """

    def __init__(self, device: hardware.Device) -> None:
        identity: dict[str, Any] = {
            "device": tables.identity(device),
            "libraries": hardware.libraries(),
            "native": _library_hash(),
        }
        self._journal = records.Journal("first-use", identity, _parse, quiet=True)
        self.found = {item.bucket: item for item in self._journal.items}
        self.given: dict[str, Measured] = {}

    def add(self, measured: Measured, keep: bool) -> None:
        self.found[measured.bucket] = measured
        if keep:
            with suppress(OSError):  # a full disk is no reason for a call to fail
                self._journal.add([measured])


@functools.cache
def _memory(device: hardware.Device) -> _Memory:
    return _Memory(device)


@functools.cache
def _library_hash() -> str:
    path = native.LIBRARY
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def _parse(record: Any, where: str = "first use") -> Measured:
    measured = records.checked(Measured, record, where)
    if BASELINE not in measured.us or not all(us > 0 for us in measured.us.values()):
        raise ValueError(
            f"{where}: us: expected times of {BASELINE!r} and others, got {measured.us!r}"
        )
    return measured


def find(name: str, device: hardware.Device, *, given_only: bool = False) -> Measured | None:
    """Times of a bucket, from this process or an earlier one.

    Args:
        name: the bucket.
        device: where.
        given_only: what a user put here; nothing that this machine happened to measure.
    """
    memory = _memory(device)
    found = memory.given.get(name)
    return found if found is not None or given_only else memory.found.get(name)


def remember(measured: Measured, device: hardware.Device, *, keep: bool = True) -> None:
    """Choose by these times from now on, and in later processes too if they are to be kept."""
    _memory(device).add(measured, keep)


def export(names: Iterable[str], device: hardware.Device) -> list[dict[str, Any]]:
    """Records of these buckets, of those that were measured: what `put` takes elsewhere."""
    found = (find(name, device) for name in names)
    return [asdict(measured) for measured in found if measured is not None]


def parse(items: Iterable[Any], where: str) -> list[Measured]:
    """What `export` gave.

    Raises:
        ValueError: names `where`, the entry, what was expected and what came.
    """
    return [_parse(item, f"{where}[{i}]") for i, item in enumerate(items)]


def put(items: Iterable[Measured], device: hardware.Device) -> None:
    """Let these go before what is measured here."""
    _memory(device).given.update({measured.bucket: measured for measured in items})


def forget() -> None:
    """Read the files again, the next time a bucket is asked for."""
    _memory.cache_clear()
