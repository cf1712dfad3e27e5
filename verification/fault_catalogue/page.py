"""The self-test's result for people: a Markdown table, and an HTML page that begins with a picture.

Each fault has one lane with its strengths from strong to weak. For each strength, the lane shows whether the gate and
the two other checks refused the file. The page needs no network and no script; every text from outside is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from verification.fault_catalogue.peer_checks import CHUNKS, KLD_BOUND, N_CTX, NMSE_BOUND
from verification.fault_catalogue.result import NAMED_RIGHT, Row, SelfTest
from verification.show.words import number, visible

_MARKS = {"pass": "passes", "fail": "fails", "refused": "refuses", "not run": "not run"}


@dataclass(frozen=True)
class Lane:
    """One fault at one level, with its strengths."""

    rows: list[Row]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def real(self) -> Row:
        return next((row for row in self.rows if row.real), self.rows[0])

    @property
    def title(self) -> str:
        return self.first.fault

    @property
    def place(self) -> str:
        return f"{self.first.level}, {'the main model' if self.first.pair == 'main' else f'a tiny {self.first.pair}'}"

    @property
    def smallest(self) -> str:
        """The weakest strength that was refused."""
        caught = [row for row in self.rows if row.caught]
        return caught[-1].strength if caught else "none"

    @property
    def lost(self) -> str:
        """The largest strength that passed although its file differs from the healthy one."""
        lost = [row for row in self.rows if not row.caught and not row.identical]
        return lost[0].strength if lost else ""


def lanes(rows: Sequence[Row]) -> dict[str, list[Lane]]:
    """Lanes by class, in the catalogue's order."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.kind, row.fault, row.pair, row.level), []).append(row)
    groups: dict[str, list[Lane]] = {}
    for key, members in found.items():
        groups.setdefault(key[0], []).append(Lane(members))
    return groups


def seen_by(row: Row, check: str) -> bool:
    """Whether another check would have stopped this file."""
    return getattr(row, f"{check}_says") in ("fail", "refused")


def score(result: SelfTest, check: str) -> tuple[int, int]:
    """(number of faults that the check refuses, number that it was run on), at the strength that people met."""
    real = [row for row in result.rows if row.real and (check == "gate" or getattr(row, f"{check}_says") != "not run")]
    return sum(row.caught if check == "gate" else seen_by(row, check) for row in real), len(real)


def markdown(result: SelfTest, *, rows: bool = True) -> str:
    """The published table."""
    gate, nmse, kld = (score(result, check) for check in ("gate", "nmse", "kld"))
    healthy_nmse = sum(h.nmse_says == "fail" for h in result.healthy)
    lines = [
        f"**{'Pass' if result.verdict == 'pass' else 'Fail'}** on {result.model}: {result.summary}.",
        "",
        "| | this gate | llama.cpp's NMSE check | Q4_K_M KLD below 0.15 |",
        "|---|---|---|---|",
        f"| faults stopped at the strength people met | {gate[0]} of {gate[1]} | {nmse[0]} of {nmse[1]} | "
        f"{kld[0]} of {kld[1]} |",
        f"| healthy files refused | {len(result.alarms)} of {len(result.healthy)} | {healthy_nmse} of "
        f"{len(result.healthy)} | {sum(_over(h.mean_kld) for h in result.healthy)} of {len(result.healthy)} |",
        "",
    ]
    for title, entries in (("Missed", result.missed), ("False alarms", result.alarms)):
        if entries:
            lines += [f"{title}: " + "; ".join(visible(entry) for entry in entries) + ".", ""]
    lines += [
        "| class | fault | file | strength people met | caught by | margin | diagnosis | smallest caught | NMSE | "
        "Q4_K_M KLD |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, group in lanes(result.rows).items():
        lines += [_table_row(kind, lane) for lane in group]
    return "\n".join(lines) + "\n"


def _over(kld: float | None) -> bool:
    return kld is not None and not kld < KLD_BOUND


def _table_row(kind: str, lane: Lane) -> str:
    row = lane.real
    lost = f" (lost at {lane.lost})" if lane.lost else ""
    more = f" and {len(row.caught_by) - 1} more" if row.caught_by[1:] else ""
    cells = [
        kind,
        lane.title,
        f"{row.level}{'' if row.pair == 'main' else f' {row.pair}'}",
        "-" if len(lane.rows) == 1 and row.value is None else row.strength,
        f"{row.caught_by[0]}{more}" if row.caught else "**nothing**",
        margin(row),
        f"{short(row.named_where)}{'' if row.named_right else ' (wrong)'}" if row.caught else "",
        (lane.smallest if len(lane.rows) > 1 else "-") + lost,
        said(row, "nmse"),
        said(row, "kld"),
    ]
    return "| " + " | ".join(visible(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def margin(row: Row) -> str:
    """Value divided by bound; without such a ratio, the count."""
    if row.margin is None:
        return row.margin_words.split(",")[0] if row.caught else ""
    return f"{number(row.margin, 2)}x"


def said(row: Row, check: str) -> str:
    """ "passes 2.4e-04"."""
    value = getattr(row, check)
    words = _MARKS[getattr(row, f"{check}_says")]
    return words if value is None else f"{words} {value:.1e}"


def short(text: str, limit: int = 48) -> str:
    """A text cut to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def html_page(result: SelfTest) -> str:
    """The self-contained page."""
    environment = Environment(
        loader=PackageLoader("verification.show"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "visible": visible, "short": short, "margin": margin}
    return environment.get_template("self_test.html.j2").render(
        result=result,
        groups=lanes(result.rows),
        seen_by=seen_by,
        said=said,
        nmse_bound=NMSE_BOUND,
        kld_bound=KLD_BOUND,
        positions=CHUNKS * (N_CTX // 2 - 1),
        named_bar=NAMED_RIGHT,
        scores={check: score(result, check) for check in ("gate", "nmse", "kld")},
        over=_over,
    )
