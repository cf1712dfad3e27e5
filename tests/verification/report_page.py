"""Reads an HTML page as a browser's parser would see it and names what keeps it from standing alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags, ids, references and visible text of a page."""

    VOID = frozenset({"meta", "link", "br", "wbr"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    @property
    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.tags if "id" in attrs]


def faults_of_page(html: str) -> list[str]:
    """Why a page would not stand alone: scripts, handlers, loads, clashing or dangling ids, unbalanced tags."""
    page = Page(html)
    faults = [f"unbalanced </{tag}>" for tag in page.unbalanced] + [f"open <{tag}>" for tag in page.open]
    for tag, attrs in page.tags:
        if tag in ("script", "iframe", "object", "embed", "base", "form", "img"):
            faults.append(f"<{tag}>")
        for name, value in attrs.items():
            if name.startswith("on"):
                faults.append(f"handler {name}")
            if name in ("src", "href", "xlink:href", "data", "srcset") and not (value or "").startswith(("#", "data:")):
                faults.append(f"{name}={value}")
    faults += [f"twice: {name}" for name in set(page.ids) if page.ids.count(name) > 1]
    used = re.findall(r"url\(#([^)]+)\)", html) + re.findall(r'href="#([^"]+)"', html)
    faults += [f"dangling: {name}" for name in set(used) - set(page.ids)]
    faults += [f"loads {found}" for found in re.findall(r"@import|url\((?!#)[^)]*\)", html)]
    return faults
