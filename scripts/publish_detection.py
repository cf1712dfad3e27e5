#!/usr/bin/env python3
"""Put a self-test's result into docs: the table between its markers in docs/detection.md, and its JSON file.

    so8t verify --self-test --out self_test
    python scripts/publish_detection.py self_test/self_test.json detection_smollm2

The second argument names the table, `detection`, `detection_smollm2` or `detection_elsewhere`, and its JSON in docs/. A
test compares the page with the JSON, so that nobody edits a number by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

from verification.fault_catalogue.page import markdown
from verification.fault_catalogue.result import SelfTest

DOCS = Path(__file__).parents[1] / "docs"


def main(source: Path, name: str) -> None:
    """Write docs/NAME.json and its table in docs/detection.md."""
    result = SelfTest.model_validate_json(source.read_text(encoding="utf-8"))
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    page = (DOCS / "detection.md").read_text(encoding="utf-8")
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    (DOCS / f"{name}.json").write_text(result.model_dump_json() + "\n", encoding="utf-8")
    (DOCS / "detection.md").write_text(f"{before}{begin}{markdown(result)}{end}{after}", encoding="utf-8")
    print(f"{DOCS / 'detection.md'}: {result.summary}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2])
