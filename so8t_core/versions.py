"""Checks of an installed library's version: an older one with known faults is refused, a newer one than the tested one
gives a warning.
"""

from __future__ import annotations

import warnings

from so8t_core.errors import InputError


def check_version(package: str, version: str, tested: tuple[int, int], *, faults: str, untried: str) -> None:
    """Compare "MAJOR.MINOR..." of an installed package with the one series that was tested.

    Args:
        faults: what is wrong in older ones, as a clause.
        untried: what may go wrong in newer ones, as a sentence that advice can follow.

    Raises:
        InputError: an older series.
    """
    series = tuple(int(part) for part in version.split(".")[:2])
    major, minor = tested
    install = f"pip install '{package}>={major}.{minor},<{major}.{minor + 1}'"
    if series < tested:
        raise InputError(f"{package} {version} is too old: {faults}; {install}")
    if series > tested:
        warnings.warn(
            f"{package} {version} was not tested with SO8T, tested is {major}.{minor}. {untried}, {install}",
            stacklevel=3,
        )
