"""The data step: JSONL files and the built-in generator to a checked /think dataset.

Two streaming passes: every row is converted, checked against the model's own chat template and spooled; then the
held-out prompts are known and the spool is dealt into train.jsonl and heldout.jsonl. In memory stay digests and counts.
Held out are: heldout_sources, the generator's held-out families, or the `heldout_share` of prompts of `sources` with
the smallest sha256(seed, prompt), which depends on content and not on order. No held-out prompt is trained on.
The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pipeline.config import DataConfig
from pipeline.data_card import data_card
from pipeline.data_report import DataReport, SourceCount, SplitCount
from pipeline.generator import GeneratedRow, generate
from pipeline.masking import check_length, render_row, special_tokens
from pipeline.rows import BrokenLine, ThinkRow, read_lines, to_think_row
from pipeline.thinking import RowError
from so8t_core.errors import InputError

Split = Literal["train", "heldout", "share"]  # share: decided by hash once all prompts are known
GENERATED = "generator"


def build_dataset(
    config: DataConfig, tokenizer: Any, out_dir: Path, seed: int, progress: Callable[[int], None] | None = None
) -> DataReport:
    """Write train.jsonl, heldout.jsonl, report.json and data_card.md into `out_dir` (which exists and is ours).

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        progress: called with the number of rows handled since the last call.
    Raises:
        InputError: a missing file, a broken line (by file and line), nothing left (with counts by reason), more
            generated rows than exist, a tokenizer without chat template.
    """
    for source in [*config.sources, *config.heldout_sources]:
        next(read_lines(Path(source)), None)  # a missing file is found before any work is done
    shared = config.heldout_share > 0 and not config.heldout_sources
    checker = _Checker(tokenizer, config)
    spool = out_dir / "spool.jsonl.tmp"
    with spool.open("w", encoding="utf-8", newline="\n") as stream:
        jobs: list[tuple[Split, list[str]]] = [
            ("heldout", config.heldout_sources),
            ("share" if shared else "train", config.sources),
        ]
        for split, sources in jobs:
            for source in sources:
                for line in checker.file_rows(Path(source), split, progress):
                    stream.write(line)
        if config.generator is not None:
            wanted = config.generator
            made = generate(wanted.rows, wanted.heldout_rows, wanted.languages, seed)
            splits: tuple[Split, Split] = ("train", "heldout")
            for generated, target in zip(made, splits, strict=True):
                for line in checker.generated_rows(generated, target, progress):
                    stream.write(line)
    report = _deal(spool, out_dir, checker, config, seed)
    spool.unlink()  # after a failure the caller drops the whole directory
    _require_rows(report, config)
    text = json.dumps(report.to_json(), ensure_ascii=False, indent=2) + "\n"
    (out_dir / "report.json").write_text(text, encoding="utf-8")
    (out_dir / "data_card.md").write_text(data_card(report.to_json()), encoding="utf-8")
    return report


class _Checker:
    """Turns rows into spool lines and counts what happens to each."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.specials = special_tokens(tokenizer)
        self.counts: dict[str, SourceCount] = {}
        self._seen: set[bytes] = set()

    def file_rows(self, path: Path, split: Split, progress: Callable[[int], None] | None) -> Iterator[str]:
        """Spool lines of one JSONL file."""
        name = self._source_name(path)
        count = self.counts[name]
        for number, item in read_lines(path):
            count.read += 1
            if progress:
                progress(1)
            try:
                if isinstance(item, BrokenLine):
                    raise item
                yield from self._accept(to_think_row(item, family=path.stem), split, name, f"{name}:{number}")
            except BrokenLine as error:
                if not self.config.skip_bad_rows:
                    way_out = "fix the line or set data.skip_bad_rows: true"
                    raise InputError(f"{path}, line {number}: {error}; {way_out}") from None
                count.rejected[error.reason] += 1
            except RowError as error:
                count.rejected[error.reason] += 1

    def generated_rows(
        self, rows: list[GeneratedRow], split: Split, progress: Callable[[int], None] | None
    ) -> Iterator[str]:
        """Spool lines of generated rows; they pass the same checks as everybody's."""
        count = self.counts.setdefault(GENERATED, SourceCount())
        for row in rows:
            count.read += 1
            if progress:
                progress(1)
            try:
                yield from self._accept(to_think_row(dict(row), family=""), split, GENERATED, GENERATED, row["id"])
            except RowError as error:
                count.rejected[error.reason] += 1

    def _accept(self, row: ThinkRow, split: Split, name: str, source: str, row_id: str | None = None) -> Iterator[str]:
        rendering = render_row(self.tokenizer, row.messages, specials=self.specials)
        check_length(rendering, self.config.max_tokens)
        digest = hashlib.sha256(json.dumps(row.messages, ensure_ascii=False).encode()).digest()
        if digest in self._seen:
            self.counts[name].duplicates += 1
            return
        self._seen.add(digest)
        record = {
            "id": row_id or digest.hex()[:16],
            "family": row.family,
            "language": row.language,
            "messages": row.messages,
            "answer": row.answer,
            "source": source,
            **row.labels,
        }
        entry = [split, _prompt_key(row), name, len(rendering.input_ids), record]
        yield json.dumps(entry, ensure_ascii=False) + "\n"

    def _source_name(self, path: Path) -> str:
        """The file's name, made unique when two directories hold the same one; never a machine's path."""
        name, number = path.name, 2
        while name in self.counts or name == GENERATED:
            name, number = f"{path.name}#{number}", number + 1
        self.counts[name] = SourceCount()
        return name


def _prompt_key(row: ThinkRow) -> str:
    """Digest of what is asked, the same for spellings that differ in width, case or spacing; the system is left out."""
    text = "\n".join(message["content"] for message in row.messages[1:-1])
    return hashlib.sha256(" ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode()).hexdigest()


def _read_spool(spool: Path) -> Iterator[tuple[Split, str, str, int, dict[str, Any]]]:
    with spool.open(encoding="utf-8", newline="\n") as stream:
        for line in stream:
            yield tuple(json.loads(line))


def _choose_heldout(spool: Path, share: float, seed: int) -> tuple[set[str], set[str]]:
    """(prompts that arrived as held out, prompts chosen by hash: at least one of the shared ones, and never all)."""
    arrived: set[str] = set()
    shared: set[str] = set()
    for split, key, *_ in _read_spool(spool):
        if split != "train":
            (arrived if split == "heldout" else shared).add(key)
    ranked = sorted(shared - arrived, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    wanted = min(max(1, round(share * len(ranked))), len(ranked) - 1) if ranked else 0
    return arrived, set(ranked[:wanted])


def _deal(spool: Path, out_dir: Path, checker: _Checker, config: DataConfig, seed: int) -> DataReport:
    """Second pass: spool to the two output files."""
    arrived, chosen = _choose_heldout(spool, config.heldout_share, seed)
    splits = {"train": SplitCount(), "heldout": SplitCount()}
    with (
        (out_dir / "train.jsonl").open("w", encoding="utf-8", newline="\n") as train_stream,
        (out_dir / "heldout.jsonl").open("w", encoding="utf-8", newline="\n") as heldout_stream,
    ):
        streams = {"train": train_stream, "heldout": heldout_stream}
        for split, key, name, tokens, record in _read_spool(spool):
            count = checker.counts[name]
            target = "heldout" if split == "heldout" or (split == "share" and key in chosen) else "train"
            if target == "train" and (key in arrived or key in chosen):
                count.rejected["prompt is held out"] += 1
                continue
            count.kept += 1
            result = splits[target]
            result.rows += 1
            result.families[record["family"]] += 1
            result.languages[record["language"]] += 1
            result.tokens[tokens] += 1
            streams[target].write(json.dumps(record, ensure_ascii=False) + "\n")
    settings = config.model_dump()
    for key in ("sources", "heldout_sources"):
        settings[key] = [Path(source).name for source in settings[key]]
    return DataReport(checker.counts, splits["train"], splits["heldout"], seed, settings)


def _require_rows(report: DataReport, config: DataConfig) -> None:
    counts = ", ".join(f"{reason}: {count}" for reason, count in report.rejected.items()) or "nothing was rejected"
    read = sum(source.read for source in report.sources.values())
    if not report.train_rows:
        raise InputError(f"no training rows are left of {read} read ({counts}); give sources with usable rows")
    wanted = bool(config.heldout_sources) or (config.generator is not None and config.generator.heldout_rows > 0)
    if wanted and not report.heldout_rows:
        raise InputError(f"no held-out rows are left of {read} read ({counts}); check data.heldout_sources")
