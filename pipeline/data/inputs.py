"""The inputs of the data step: sources with their manifest entries, and all files that decide the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.config import DataConfig
from pipeline.data.licences import LicencePolicy
from pipeline.data.source_manifest import Source, resolve
from pipeline.data.source_rows import count_rows, read_rows


def data_sources(config: DataConfig) -> tuple[list[Source], list[Source]]:
    """(training, held-out) sources with their facts from the manifest; only an excluded URL may lack its file.

    Raises:
        InputError: see `resolve`; a missing file.
    """
    manifest = Path(config.manifest) if config.manifest else None
    allow = config.unlisted_sources == "allow"
    groups = []
    for wanted, foreign in ((config.sources, "evaluation"), (config.heldout_sources, "training")):
        found = resolve(wanted, manifest, LicencePolicy.of(config), allow_unlisted=allow)
        group = []
        for source in found:
            if source.objection is None and source.facts.get("purpose") == foreign == "evaluation":
                source = replace(source, objection="purpose is evaluation")
            if source.facts.get("url") is None or source.objection is None:
                next(read_rows(source.path), None)  # finds a missing file before any work is done
            group.append(source)
        groups.append(group)
    return groups[0], groups[1]


def data_inputs(config: DataConfig) -> dict[str, Path]:
    """Every file that decides the result: sources, manifest, labels, formats, records, and collected rows of URLs.

    Raises:
        InputError: see `resolve`.
    """
    manifest = Path(config.manifest) if config.manifest else None
    found = {name: Path(name) for name in (config.manifest, config.safety_labels, config.formats) if name}
    names = [*config.sources, *config.heldout_sources]
    for name, source in zip(
        names, resolve(names, manifest, LicencePolicy.of(config), allow_unlisted=True), strict=True
    ):
        if "://" not in name:
            found[name] = source.path
        elif source.path.parent.is_dir():
            found[name] = source.path.parent  # rows and record
    return found


def expected_rows(config: DataConfig) -> int:
    """The total of the progress bar: the rows of the sources and of the generator."""
    total = config.generator.rows + config.generator.heldout_rows if config.generator else 0
    for source in (source for group in data_sources(config) for source in group):
        if source.path.exists():
            total += count_rows(source.path)
    return total
