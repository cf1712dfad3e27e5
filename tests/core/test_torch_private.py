"""Undocumented calls of torch stand in one file, and do what that file says of them."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from so8t_core.torch_private import inside_backward, remove_forward_pre_hook, writes

ROOT = Path(__file__).parents[2]
PRIVATE = {"_version", "_forward_pre_hooks", "_forward_hooks", "_parameters", "_buffers", "_modules"}  # of any object


def private_calls(source: str) -> Iterator[str]:
    """Attributes with an underscore in front, of torch's modules or known as a tensor's or module's; such imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            private = node.attr in PRIVATE or ast.unparse(node).startswith("torch.")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            private = "._" in str(node.module) or any(name.name.startswith("_") for name in node.names)
        else:
            private = False
        if private:
            yield ast.unparse(node)


def test_undocumented_torch_stands_in_one_file() -> None:
    files = [path for name in ("so8t_core", "verification", "pipeline") for path in (ROOT / name).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if list(private_calls(path.read_text(encoding="utf-8")))}
    assert found == {"so8t_core/torch_private.py"}


@pytest.mark.parametrize(
    "planted", ["torch._C.f()", "torch.ops.mkldnn._g()", "theta._version", "from torch._ops import x", "m._modules"]
)
def test_a_planted_call_is_found(planted: str) -> None:
    assert list(private_calls(planted))
    assert not list(private_calls("torch.cpu.synchronize(); self._known; torch.__version__; from torch import nn"))


def test_a_backward_is_known_from_inside() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda _: seen.append(inside_backward()))
    assert not inside_backward()
    x.sum().backward()
    assert seen == [True]
    assert not inside_backward()


def test_a_write_in_place_is_counted_and_a_read_is_not() -> None:
    x = torch.zeros(2)
    before = writes(x)
    x.sum()
    assert writes(x) == before
    x.add_(1)
    assert writes(x) > before


def test_a_hook_is_removed_from_a_copy_that_has_no_handle() -> None:
    def ours(*_: Any) -> None: ...
    def theirs(*_: Any) -> None: ...

    module = nn.Linear(2, 2)
    for hook in (ours, theirs, ours):
        module.register_forward_pre_hook(hook)
    copied = copy.deepcopy(module)
    remove_forward_pre_hook(copied, ours)
    assert list(copied._forward_pre_hooks.values()) == [theirs]
    assert len(module._forward_pre_hooks) == 3
