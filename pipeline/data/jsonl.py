"""Read the JSON Lines files that the data step wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from so8t_core.errors import InputError


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a UTF-8 JSONL file, one object a line.

    Raises:
        InputError: missing file, or a line that is no JSON object (named by file and line).
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; run the data step first")
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number} is not a JSON object")
            rows.append(row)
    return rows
