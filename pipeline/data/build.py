"""The data step: turn files (`source_rows`) and generated rows into a checked dataset of thinking and answers.

It makes two streaming passes. The first converts every row, checks it against the policy (source, licence, label,
personal data) and the model's own chat template, and spools it. The second knows all held-out prompts and deals the
spool into train.jsonl and heldout.jsonl. Memory holds counts and 16-byte digests (32 MB for a million rows, see
`digest_set`). Held-out rows come from heldout_sources, the generator's held-out families, or the `heldout_share` of
prompts of `sources` with the smallest sha256(seed, prompt), which depends on content and not on order. No held-out
prompt is trained on. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config import DataConfig
from pipeline.data.card import data_card
from pipeline.data.digest_set import DigestSet
from pipeline.data.formats import load_formats
from pipeline.data.generator import GeneratedRow, generate
from pipeline.data.inputs import data_sources
from pipeline.data.labels import SafetyLabels
from pipeline.data.licences import LicencePolicy
from pipeline.data.masking import check_length, render_row, special_tokens
from pipeline.data.privacy import GENERATOR_FACTS, PrivacyFilter, row_licence
from pipeline.data.report import DataReport, SourceCount, SplitCount, tally
from pipeline.data.rows import RowOptions, ThinkRow, to_think_row
from pipeline.data.source_manifest import Source
from pipeline.data.source_rows import read_rows
from pipeline.data.think_form import BrokenLine, RowError
from so8t_core.errors import InputError

Split = Literal["train", "heldout", "share"]  # share: decided by hash once all prompts are known
GENERATED = "generator"
Progress = Callable[[int], None]


def build_dataset(
    config: DataConfig, tokenizer: Any, out_dir: Path, seed: int, progress: Progress | None = None
) -> DataReport:
    """Write train.jsonl, heldout.jsonl, report.json and data_card.md into the empty directory `out_dir`.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        progress: called with the number of rows handled since the last call.
    Raises:
        InputError: a missing file, a broken line (by file and line), a manifest or label file that cannot be used,
            no row left (with counts by reason), more generated rows than exist, a tokenizer without chat template.
    """
    load_formats(config.formats)
    sources, heldout_sources = data_sources(config)
    shared = config.heldout_share > 0 and not config.heldout_sources
    checker = _Checker(tokenizer, config, seed)
    spool = out_dir / "spool.tmp"
    with spool.open("w", encoding="utf-8", newline="\n") as stream:
        jobs: list[tuple[Split, list[Source]]] = [
            ("heldout", heldout_sources),
            ("share" if shared else "train", sources),
        ]
        for split, group in jobs:
            for source in group:
                for line in checker.file_rows(source, split, progress):
                    stream.write(line)
        if config.generator is not None:
            wanted = config.generator
            made = generate(wanted.rows, wanted.heldout_rows, wanted.languages, seed)
            splits: tuple[Split, Split] = ("train", "heldout")
            for generated, target in zip(made, splits, strict=True):
                for line in checker.generated_rows(generated, target, progress):
                    stream.write(line)
    checker.labels.require_match()
    checker.forget_seen()
    report = _deal(spool, out_dir, checker, config, seed)
    spool.unlink()  # after an error the caller removes the whole directory
    _require_rows(report, config)
    text = json.dumps(report.to_json(), ensure_ascii=False, indent=2) + "\n"
    (out_dir / "report.json").write_text(text, encoding="utf-8")
    (out_dir / "data_card.md").write_text(data_card(report.to_json()), encoding="utf-8")
    return report


class _Checker:
    """Turns rows into spool lines, and counts kept and rejected rows."""

    def __init__(self, tokenizer: Any, config: DataConfig, seed: int) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.specials = special_tokens(tokenizer)
        self.counts: dict[str, SourceCount] = {}
        file = Path(config.safety_labels) if config.safety_labels else None
        self.labels = SafetyLabels(file, config.unsafe_labels, config.safe_labels)
        self.privacy = PrivacyFilter(config.pii, config.pii_kinds)
        self.options = RowOptions(config.think_form, config.tools, config.earlier_turns, config.disagreements)
        self._licences = LicencePolicy.of(config)
        self._seed = seed
        self._seen = DigestSet()

    def forget_seen(self) -> None:
        """Free the data that only the first pass needs."""
        self._seen = DigestSet()

    def file_rows(self, source: Source, split: Split, progress: Progress | None) -> Iterator[str]:
        """Spool lines of one source; an excluded source is read too, so that its rows are counted."""
        name = self._source_name(source)
        count = self.counts[name]
        if not source.path.exists():
            return  # never collected: no other missing file passes `data_sources`
        for number, item in read_rows(source.path):
            count.read += 1
            if progress:
                progress(1)
            try:
                if isinstance(item, BrokenLine):
                    raise item
                if source.objection is not None:
                    raise RowError(source.objection)
                if said := row_licence(item, self._licences):
                    raise RowError(said)
                row = to_think_row(item, family=Path(source.name).stem, options=self.options)
                label = self.labels.look_up(item, name, number, refusal_only=source.refusal_only)
                if label is not None:
                    self.labels.check(label, row.thought)
                    use = {"unsafe_label": label.kind, "unsafe_label_source": label.source, "purpose": "refusal"}
                    row = replace(row, labels=row.labels | use)
                yield from self._accept(row, split, name, f"{name}:{number}")
            except BrokenLine as error:
                if not self.config.skip_bad_rows:
                    way_out = "fix the line or set data.skip_bad_rows: true"
                    raise InputError(f"{source.path}, line {number}: {error}; {way_out}") from None
                count.reject(error.reason, f"{name}:{number}", None)
            except RowError as error:
                row_or_none = item if isinstance(item, dict) else None
                count.reject(error.reason, f"{name}:{number}", row_or_none, error.shown)

    def generated_rows(self, rows: list[GeneratedRow], split: Split, progress: Progress | None) -> Iterator[str]:
        """Spool lines of generated rows, checked like all other rows."""
        count = self.counts.setdefault(GENERATED, SourceCount(facts=GENERATOR_FACTS))
        for row in rows:
            count.read += 1
            if progress:
                progress(1)
            try:
                made = to_think_row(dict(row), family="", options=self.options)
                yield from self._accept(made, split, GENERATED, GENERATED, row["id"])
            except RowError as error:
                count.reject(error.reason, row["id"], dict(row))

    def _accept(self, row: ThinkRow, split: Split, name: str, source: str, row_id: str | None = None) -> Iterator[str]:
        count = self.counts[name]
        row = self.privacy.clean(row)
        rendering = render_row(self.tokenizer, row.messages, specials=self.specials, tools=row.tools)
        check_length(rendering, self.config.max_tokens)
        digest = hashlib.sha256(json.dumps(row.messages, ensure_ascii=False).encode()).digest()
        if not self._seen.add(digest[:16]):
            count.duplicate(source, {"messages": [m for m in row.messages if m["role"] != "system"]})
            return
        for note in (*row.notes, *rendering.notes):
            tally(count.notes, note)
        record = {
            "id": row_id or digest.hex()[:16],
            "family": row.family,
            "language": row.language,
            "messages": row.messages,
            "answer": row.answer,
            **({"tools": row.tools} if row.tools else {}),
            "source": source,
            **row.labels,
        }
        head = [split, self._rank(row), name, len(rendering.input_ids), row.family, row.language]
        unsafe = row.labels.get("unsafe_label"), row.labels.get("unsafe_label_source")
        yield f"{json.dumps([*head, *unsafe])}\t{json.dumps(record, ensure_ascii=False)}\n"

    def _rank(self, row: ThinkRow) -> str:
        """Rank of the row's prompt in the seed's order of all prompts: 16 bytes, equal for equal prompts."""
        return hashlib.sha256(f"{self._seed}/{_prompt_key(row)}".encode()).hexdigest()[:32]

    def _source_name(self, source: Source) -> str:
        """The source's name, made unique where two directories hold files of one name; never a machine's path."""
        name, number = source.name, 2
        while name in self.counts or name == GENERATED:
            name, number = f"{source.name}#{number}", number + 1
        self.counts[name] = SourceCount(facts=source.facts, objection=source.objection)
        return name


def _prompt_key(row: ThinkRow) -> str:
    """Digest of the question without the system text; equal for spellings that differ in width, case or spacing."""
    text = "\n".join(message["content"] for message in row.messages[:-1] if message["role"] != "system")
    return hashlib.sha256(" ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode()).hexdigest()


Head = tuple[Split, str, str, int, str, str, str | None, str | None]


def _read_spool(spool: Path) -> Iterator[tuple[Head, bytes, str]]:
    """(head, rank, record's line) of each spooled row; JSON escapes tabs, so the first one ends the head."""
    with spool.open(encoding="utf-8", newline="\n") as stream:
        for line in stream:
            head, _, record = line.partition("\t")
            fields: Head = tuple(json.loads(head))
            yield fields, bytes.fromhex(fields[1]), record


def _choose_heldout(spool: Path, share: float) -> tuple[DigestSet, DigestSet]:
    """(prompts that came as held out, prompts chosen by rank: at least one of those that may be chosen, never all)."""
    import numpy as np

    arrived, shared, chosen = DigestSet(), DigestSet(), DigestSet()
    for head, rank, _ in _read_spool(spool):
        if head[0] != "train":
            (arrived if head[0] == "heldout" else shared).add(rank)
    ranks = np.fromiter((rank for rank in shared if rank not in arrived), dtype="V16")
    ranks = np.sort(ranks.view([("high", ">u8"), ("low", ">u8")]), order=("high", "low"))
    wanted = min(max(1, round(share * len(ranks))), len(ranks) - 1) if len(ranks) else 0
    for rank in ranks[:wanted]:
        chosen.add(rank.tobytes())
    return arrived, chosen


def _deal(spool: Path, out_dir: Path, checker: _Checker, config: DataConfig, seed: int) -> DataReport:
    """The second pass: deal the spool into the two output files."""
    arrived, chosen = _choose_heldout(spool, config.heldout_share)
    splits = {"train": SplitCount(), "heldout": SplitCount()}
    with (
        (out_dir / "train.jsonl").open("w", encoding="utf-8", newline="\n") as train_stream,
        (out_dir / "heldout.jsonl").open("w", encoding="utf-8", newline="\n") as heldout_stream,
    ):
        streams = {"train": train_stream, "heldout": heldout_stream}
        for (split, _, name, tokens, family, language, unsafe, labelled_by), rank, line in _read_spool(spool):
            count = checker.counts[name]
            target = "heldout" if split == "heldout" or (split == "share" and rank in chosen) else "train"
            if target == "train" and (rank in arrived or rank in chosen):
                count.reject("prompt is held out", json.loads(line)["source"], json.loads(line))
                continue
            count.kept += 1
            result = splits[target]
            result.rows += 1
            tally(result.families, family)
            tally(result.languages, language)
            result.tokens[tokens] += 1
            if unsafe is not None:
                tally(result.refusals, f"{unsafe} ({labelled_by})")
            streams[target].write(line)
    settings = config.model_dump(mode="json")
    for key in ("sources", "heldout_sources"):
        settings[key] = [source if "://" in source else Path(source).name for source in settings[key]]
    for key in ("manifest", "safety_labels", "formats"):
        settings[key] = Path(settings[key]).name if settings[key] else None
    policy = {"pii": checker.privacy.to_json(), "labels_without_a_row": checker.labels.unmatched}
    return DataReport(checker.counts, splits["train"], splits["heldout"], seed, settings, policy)


def _require_rows(report: DataReport, config: DataConfig) -> None:
    counts = ", ".join(f"{reason}: {count}" for reason, count in report.rejected.items()) or "nothing was rejected"
    read = sum(source.read for source in report.sources.values())
    if not report.train_rows:
        excluded = any(source.objection for source in report.sources.values())
        hint = "state licence, robots, collected and purpose in data.manifest (docs/data_policy.md)"
        way_out = hint if excluded else "give sources with usable rows"
        raise InputError(f"no training rows are left of {read} read ({counts}); {way_out}")
    wanted = bool(config.heldout_sources) or (config.generator is not None and config.generator.heldout_rows > 0)
    if wanted and not report.heldout_rows:
        raise InputError(f"no held-out rows are left of {read} read ({counts}); check data.heldout_sources")
