"""Laws of the picture of a file's drawers: every tensor is one cell at its layer and role, in its drawer's colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from report_page import Page, faults_of_page
from sample_report import sample_report

from verification.gate.report import Report, TensorRow
from verification.show.tensor_map import TensorMap, differing, strips, tensor_maps, unproven
from verification.show.write import load_report, to_html, to_json, write_report
from verification.weight_parity.profile import error_profile


def row(name: str, drawer: str = "proven", **more: object) -> TensorRow:
    fields = {"candidate": "Q8_0", "name": name, "shape": [8, 8], "nominal_type": "Q8_0", "actual_type": "Q8_0"}
    return TensorRow.model_validate({**fields, "drawer": drawer, **more})


def with_rows(*rows: TensorRow) -> Report:
    return sample_report().model_copy(update={"tensors": list(rows)})


def at(map_: TensorMap, name: str) -> tuple[str, str, str]:
    """(layer, role, drawer) that the picture shows for a tensor."""
    cell = next(cell for cell in map_.cells if cell.words.startswith(f"{name},"))
    role = next(text for y, text in map_.roles if y == cell.y + map_.size / 2)
    return next((text for x, text in map_.layers if x == cell.x + map_.size / 2), "outside"), role, cell.drawer


def test_every_tensor_of_every_file_is_one_cell() -> None:
    report = sample_report("fail")
    maps = tensor_maps(report)
    assert [m.candidate for m in maps] == ["F16", "Q8_0", "Q4_K_M"]
    assert sum(len(m.cells) for m in maps) == len(report.tensors)
    for m in maps:
        assert len({(cell.x, cell.y) for cell in m.cells}) == len(m.cells)
        assert all(0 <= cell.x <= m.width - m.size and 0 <= cell.y <= m.height - m.size for cell in m.cells)
    assert [(drawer, count) for drawer, count, _ in maps[2].counts] == [
        ("proven", 241),
        ("judged", 30),
        ("unexplained", 1),
    ]


def test_a_cell_stands_at_its_layer_and_role() -> None:
    found = tensor_maps(
        with_rows(
            row("token_embd.weight"),
            row("blk.0.attn_q.weight"),
            row("blk.7.attn_q.weight", "unexplained"),
            row("blk.7.attn_k.weight", "judged"),
            row("v.blk.7.attn_q.weight", "not compared"),
            row("rope_freqs.weight"),
        )
    )[0]
    assert at(found, "token_embd.weight") == ("outside", "token_embd", "proven")
    assert at(found, "blk.0.attn_q.weight") == ("0", "attn_q", "proven")
    assert at(found, "blk.7.attn_q.weight") == ("7", "attn_q", "unexplained")
    assert at(found, "blk.7.attn_k.weight") == ("7", "attn_k", "judged")
    assert at(found, "v.blk.7.attn_q.weight") == ("7", "v.attn_q", "not compared")
    assert found.label == "Tensors of Q8_0 by layer and role: 3 proven, 1 judged, 1 unexplained, 1 not compared"


@pytest.mark.parametrize("drawer", ["proven", "judged", "unexplained", "not compared"])
def test_the_page_shows_a_drawer_by_class_and_shape(drawer: str) -> None:
    html = to_html(with_rows(row("blk.0.attn_q.weight", drawer)))
    drawn = html.count(f'<rect class="{drawer.replace(" ", "-")}"')
    assert drawn == 2  # the cell and its line of the legend
    assert html.count('<circle class="dot"') == (2 if drawer == "judged" else 0)
    assert html.count('<path class="cross"') == (2 if drawer == "unexplained" else 0)


def test_the_page_names_what_is_not_proven_worst_first_and_where_it_differs() -> None:
    rows = [
        row("blk.1.a.weight", "judged", blocks=100, blocks_differ=3, why="by another build or machine"),
        row("blk.2.a.weight", "judged", blocks=100, blocks_differ=90),
        row("blk.3.a.weight", "unexplained", blocks=4608, blocks_differ=12, found="<b>block 12</b> is 0.3 off"),
        row("blk.4.a.weight"),
    ]
    report = with_rows(*rows)
    assert [r.name for r in unproven(report)] == ["blk.3.a.weight", "blk.2.a.weight", "blk.1.a.weight"]
    assert differing(rows[2]) == "12 of 4,608 blocks (0.26 %)"
    html = to_html(report)
    assert faults_of_page(html) == []
    page = Page(html)
    assert "12 of 4,608 blocks (0.26 %)" in page.text
    assert "<b>block 12</b> is 0.3 off" in page.text  # as text: the mark-up was escaped
    assert ("b", {}) not in page.tags


def test_an_older_report_without_drawers_has_no_picture() -> None:
    report = with_rows(*(r.model_copy(update={"drawer": None}) for r in sample_report().tensors))
    assert tensor_maps(report) == []
    assert "by its drawer" not in to_html(report)


def test_a_large_model_keeps_its_picture_small() -> None:
    rows = [row(f"blk.{layer}.{role}.weight") for layer in range(300) for role in range(200)]
    found = tensor_maps(with_rows(*rows))[0]
    assert len(found.cells) <= 256 * 120
    assert found.width < 3000
    assert found.counts[0][1] == len(rows)


def test_what_a_tensor_holds_survives_report_json(tmp_path: Path) -> None:
    report = with_rows(row("blk.3.a.weight", "unexplained", blocks=9, blocks_differ=2, found="block 1"))
    write_report(report, tmp_path)
    assert to_json(load_report(tmp_path)) == to_json(report)


def test_the_difference_is_shown_where_it_sits() -> None:
    """Rows 8 to 15 of 64 in eight stretches; the report names them and draws a bar a stretch."""
    wanted = np.ones((64, 32), dtype=np.float32)
    values = wanted.copy()
    values[8:16] += np.float32(0.5)
    profile = error_profile(values, wanted)
    assert len(profile.rows) == len(profile.columns) == 32
    squares = np.square(profile.rows)
    assert np.flatnonzero(squares).tolist() == [4, 5, 6, 7]
    assert np.isclose(squares.sum(), np.square(profile.columns).sum())
    assert np.isclose(np.sqrt(squares.sum()), np.linalg.norm(values - wanted) / np.linalg.norm(wanted))
    bad = row("blk.3.a.weight", "unexplained", shape=[64, 32], rows=list(profile.rows), columns=[0.1, 0.0, 0.2])
    along, across = strips(bad)
    assert along.words == "most in rows 8 to 9 of 64: 25 % of the squared error"
    assert across.words == "most in columns 22 to 31 of 32: 80 % of the squared error"
    html = to_html(with_rows(bad))
    assert html.count('<svg class="strip"') == 2
    assert "most in rows 8 to 9 of 64" in html
    assert strips(row("blk.3.a.weight", "judged")) == []
