"""Reads YAML with one meaning and of bounded cost, for policies and configurations.

Refused are aliases, which grow to any size, a key that stands twice in a mapping, which two readers understand in two
ways, nesting without end, numbers of more than 64 bits, and what Python has no value for (the date 2026-99-99).
Source: YAML 1.1 as PyYAML's `safe_load` reads it.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_DEPTH = 16  # nested mappings and lists; a configuration has 6
MAX_NUMBER = 1 << 63


class NotYaml(ValueError):
    """YAML that is not read; says why in one line."""


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise NotYaml("it uses an alias (*name); write the value out")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotYaml(f"it is nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node)
        if abs(value) >= MAX_NUMBER:
            raise NotYaml(f"the number in line {node.start_mark.line + 1} has more than 64 bits")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=deep)
        if len(found) < len(node.value):
            raise NotYaml(f"a key stands twice in the mapping of line {node.start_mark.line + 1}; keep one of them")
        return found


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(text: str) -> Any:
    """The value that a text writes.

    Raises:
        NotYaml: see above; or no YAML at all.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise NotYaml(" ".join(str(error).split())) from None
