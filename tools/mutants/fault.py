"""What a planted fault is."""

from __future__ import annotations

from dataclasses import dataclass

# Where most of them are.
PACKAGE = "maestro_kernels"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: unique.
        file: from the root of the repository.
        old: the text that is right.
        new: the text in its place.
        test: node id of the test that must fail.
        harm: what the fault would do to a user.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    harm: str
