"""The tuning log as one self-contained HTML file: rendered from its Markdown, with the plots inside.

It works with any Markdown: each section of a heading of the second and third level folds, each table of three rows or
more sorts, and of a long log what is further down begins folded.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup

from search.diagnosis.messages import Lang
from search.markdown import environment, slug
from search.report import words
from search.report.render import TEMPLATES

LANGUAGES: dict[Lang, str] = {"en": "en", "zh": "zh-Hans"}
BUTTONS: dict[Lang, tuple[str, str]] = {"en": ("Open all", "Fold all"), "zh": ("全部展开", "全部折叠")}
OPEN = 3
"""Sections at the top that are always open."""
SHORT_LOG = 120
"""Lines of a log in which nothing is folded at first."""
LONG = 40
"""Lines of Markdown from which on a later section begins folded."""
MANY = 6
"""Subsections from which on those of a section begin folded."""


def html(markdown: str, lang: Lang, title: str, images: Mapping[str, bytes]) -> str:
    """A page that needs no other file and no network, and runs no script but its own.

    Args:
        markdown: The log; raw HTML in it is shown as text.
        lang: Its language.
        title: Shown by the browser.
        images: PNG or SVG by the address that the Markdown gives it; images at other addresses are left out. SVG
            becomes part of the page, so it must be of our own making.
    """
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer).enable("table")
    assert isinstance(parser.renderer, _Renderer)
    parser.renderer.images = images
    tokens = parser.parse(markdown)
    contents = _anchors(tokens)
    folded = _folding(tokens, len(markdown.splitlines()))
    body = parser.renderer.render(folded, parser.options, {})
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    open_all, fold_all = BUTTONS[lang]
    page = environment(TEMPLATES).get_template("page.html.jinja")
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    return page.render(
        lang=LANGUAGES[lang],
        title=title,
        style=Markup(style),  # a file of this package, no data in it
        contents=contents,
        contents_title=words.fill("contents", lang),
        folds=len(folded) > len(tokens),
        open_all=open_all,
        fold_all=fold_all,
        script=Markup(script),  # as the style
        script_hash=Markup(f"sha256-{digest}"),
        body=Markup(body),  # markdown-it escapes, raw HTML is off
    )


def _anchors(tokens: Sequence[Token]) -> list[tuple[int, str, str]]:
    """Give every heading the id that links use; returns (level, id, text) of each entry of the table of contents."""
    seen: dict[str, int] = {}
    found = []
    for opening, inline in pairwise(tokens):
        if opening.type != "heading_open":
            continue
        text = "".join(t.content for t in inline.children or () if t.type in ("text", "code_inline"))
        name = slug(text)
        seen[name] = seen.get(name, 0) + 1
        anchor = name if seen[name] == 1 else f"{name}-{seen[name] - 1}"
        opening.attrSet("id", anchor)
        level = int(opening.tag[1])
        if level == 2:
            found.append((level, anchor, text))
    return found


def _folding(tokens: Sequence[Token], lines: int) -> list[Token]:
    """The tokens with each section in `<details>`, its heading the summary, subsections within sections."""
    heads = [(at, int(t.tag[1])) for at, t in enumerate(tokens) if t.type == "heading_open" and t.level == 0]
    starts = {at: level for at, level in heads if level in (2, 3)}
    found: list[Token] = []
    open_levels: list[int] = []
    sections = 0
    for at, token in enumerate(tokens):
        level = int(token.tag[1]) if token.type == "heading_open" and token.level == 0 else 9
        while open_levels and level <= open_levels[-1]:
            open_levels.pop()
            found.append(_raw("</details>\n"))
        if at in starts:
            sections += level == 2
            later = [(n, other) for n, other in heads if n > at]
            end = next((n for n, other in later if other <= level), len(tokens))
            begins, ends = _line(tokens, at), lines if end == len(tokens) else _line(tokens, end)
            siblings = _siblings(heads, at) if level == 3 else 0
            long = level == 2 and sections > OPEN and ends - begins > LONG
            shut = lines > SHORT_LOG and (siblings >= MANY or long)
            found.append(_raw("<details><summary>" if shut else "<details open><summary>"))
            open_levels.append(level)
        found.append(token)
        if token.type == "heading_close" and token.level == 0 and int(token.tag[1]) in (2, 3):
            found.append(_raw("</summary>\n"))
    return [*found, *(_raw("</details>\n") for _ in open_levels)]


def _siblings(heads: Sequence[tuple[int, int]], at: int) -> int:
    """How many headings of the third level are in the section of this one."""
    before = max((n for n, level in heads if level < 3 and n < at), default=-1)
    after = min((n for n, level in heads if level < 3 and n > at), default=None)
    return sum(level == 3 and before < n and (after is None or n < after) for n, level in heads)


def _line(tokens: Sequence[Token], at: int) -> int:
    return tokens[at].map[0] if tokens[at].map else 0  # type: ignore[index]


def _raw(html: str) -> Token:
    """A piece of our own HTML; what the Markdown has of it is text, since its parser takes none."""
    return Token("html_block", "", 0, content=html)


_SVG_ID = re.compile(r"""(\bid="|(?:xlink:)?href="#|url\(#)""")


def _inline_svg(data: bytes, alt: str, prefix: str) -> str:
    """A plot as part of the page: without prolog, as wide as the page, its ids its own."""
    text = data.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg\b[^>]*?)\s+width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?)\s+height="[^"]*"', r"\1", text, count=1)
    text = _SVG_ID.sub(lambda found: f"{found[0]}{prefix}-", text)
    text = text.replace("*{stroke", ".plot *{stroke")
    return f'<div class="plot">{text.replace("<svg", f"""<svg role="img" aria-label="{alt}" """.rstrip(), 1)}</div>'


class _Renderer(RendererHTML):
    """Images from memory, plots as part of the page, and tables that scroll on their own on a narrow screen."""

    images: Mapping[str, bytes]
    drawn = 0

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        token = tokens[idx]
        data = self.images.get(str(token.attrGet("src")))
        alt = Markup.escape(self.renderInlineAsText(token.children or [], options, env))
        if data is None:
            return f"<em>{alt}</em>"
        if data.lstrip()[:5] in (b"<?xml", b"<svg "):
            self.drawn += 1
            return _inline_svg(data, str(alt), f"plot{self.drawn}")
        source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
        return f'<img src="{source}" alt="{alt}">'

    def table_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return '<div class="table"><table>\n'

    def table_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return "</table></div>\n"
