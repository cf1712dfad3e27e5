"""The series of each library that SO8T was tested with: an older one is refused, a newer one gives a warning."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from so8t_core.errors import InputError


class _Tested(NamedTuple):
    series: tuple[int, int]  # MAJOR, MINOR
    faults: str  # of older series, as a clause
    untried: str  # risk of newer series, as the start of a sentence that ends with advice


_TESTED = {
    # Up to 0.20 peft merged OFT into quantised layers without the rotation.
    "peft": _Tested(
        series=(0, 21),
        faults="its merges into quantised layers are silently wrong",
        untried="SO8T extends its tables: if attaching or loading fails",
    ),
    # 0.48 lost 8-bit weights when a layer was moved, and before 0.49 4-bit ones were dequantised inaccurately on CPUs
    # with AVX512; the switch that `attach` needs to keep them unpacked was never tried before 0.50.
    "bitsandbytes": _Tested(
        series=(0, 50),
        faults="its quantised layers are wrong in ways mended later (moved 8-bit weights, 4-bit weights on CPUs)",
        untried="Its 4-bit weights have to stay unpacked on CPUs: if training does not lower the loss",
    ),
}


def check_version(package: str, version: str) -> None:
    """Compare "MAJOR.MINOR..." of an installed "peft" or "bitsandbytes" with the tested series.

    Raises:
        InputError: an older series.
    """
    tested = _TESTED[package]
    series = tuple(int(part) for part in version.split(".")[:2])
    major, minor = tested.series
    install = f"pip install '{package}>={major}.{minor},<{major}.{minor + 1}'"
    if series < tested.series:
        raise InputError(f"{package} {version} is too old: {tested.faults}; {install}")
    if series > tested.series:
        warnings.warn(
            f"{package} {version} was not tested with SO8T, tested is {major}.{minor}. {tested.untried}, {install}",
            stacklevel=2,
        )
