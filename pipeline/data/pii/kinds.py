"""The kinds of personal and confidential content, by name; what finds them is in `pii`.

Apart from it, so that reading a configuration needs none of the libraries that do the finding.
"""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal[
    "secret", "email", "iban", "card", "my_number", "corporate_number", "phone", "ip", "address", "confidential"
]
KINDS: tuple[Kind, ...] = get_args(Kind)  # in this order the first claim on a span wins
