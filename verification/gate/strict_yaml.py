"""Reads YAML that has one meaning and bounded cost, for policies and configurations.

The reader refuses aliases (they can grow to any size), duplicate keys in a mapping (two readers understand them
differently), deep nesting, numbers of more than 64 bits, and values that Python cannot hold (the date 2026-99-99).
Source: YAML 1.1 as PyYAML's `safe_load` reads it.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_DEPTH = 16  # nested mappings and lists; a configuration has 6
MAX_NUMBER = 1 << 63


class NotYaml(ValueError):
    """Refused YAML; the message says why in one line."""


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
    """The value of a YAML text.

    Raises:
        NotYaml: the text is not YAML, or is refused for a reason in the module's docstring.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise NotYaml(" ".join(str(error).split())) from None
