"""Pages of documentation, read with a Markdown parser into their blocks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PARSER = MarkdownIt("commonmark").enable("table")


class Block(NamedTuple):
    """A heading, a paragraph (of a list item, too), a cell of a table or a block of code."""

    kind: str  # h1 to h6, p, th, td or code
    depth: int  # of lists around it, counted as the parser counts
    line: int  # from 1
    text: str  # as written, but for links' addresses and marks of emphasis; of code: all of it
    prose: str  # the text without inline code
    code: tuple[str, ...]  # inline; of a block of code: its language
    links: tuple[str, ...]


def blocks_of(text: str) -> list[Block]:
    found: list[Block] = []
    kind, line = "", 0
    for token in PARSER.parse(text):
        line = token.map[0] + 1 if token.map else line
        if token.type == "fence":
            language = (token.info,)
            found.append(Block("code", token.level, line, token.content, "", language, ()))
        elif token.type == "inline":
            found.append(block_of(kind, line, token))
        kind = token.tag
    return found


def block_of(kind: str, line: int, token: Token) -> Block:
    children = token.children or []
    pieces = {"softbreak": "\n", "hardbreak": "\n"}
    text = "".join(
        f"`{child.content}`"
        if child.type == "code_inline"
        else pieces.get(child.type, child.content if child.type == "text" else "")
        for child in children
    )
    links = tuple(
        unquote(str(child.attrs["src" if child.type == "image" else "href"]))
        for child in children
        if child.type in ("link_open", "image")
    )
    code = tuple(child.content for child in children if child.type == "code_inline")
    prose = re.sub(r"`[^`]*`", "`", text)
    return Block(kind, token.level, line, text, prose, code, links)


def is_heading(block: Block) -> bool:
    return block.kind in ("h1", "h2", "h3", "h4", "h5", "h6")


def anchors_of(text: str) -> list[str]:
    """The anchors of its headings, in order, as GitHub makes them."""
    return [
        re.sub(r"[^\w\- ]", "", block.text.lower()).replace(" ", "-")
        for block in blocks_of(text)
        if is_heading(block)
    ]
