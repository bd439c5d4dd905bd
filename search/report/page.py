"""The tuning log as one self-contained HTML file: rendered from its Markdown, with the plots inside."""

from __future__ import annotations

import base64
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


def html(markdown: str, lang: Lang, title: str, images: Mapping[str, bytes]) -> str:
    """A page that needs no other file and no network, and runs no scripts.

    Args:
        markdown: The log; raw HTML in it is shown as text.
        lang: Its language.
        title: Shown by the browser.
        images: PNG by the address that the Markdown gives it; images at other addresses are left out.
    """
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer).enable("table")
    assert isinstance(parser.renderer, _Renderer)
    parser.renderer.images = images
    tokens = parser.parse(markdown)
    contents = _anchors(tokens)
    body = parser.renderer.render(tokens, parser.options, {})
    page = environment(TEMPLATES).get_template("page.html.jinja")
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    return page.render(
        lang=LANGUAGES[lang],
        title=title,
        style=Markup(style),  # a file of this package, no data in it
        contents=contents,
        contents_title=words.fill("contents", lang),
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


class _Renderer(RendererHTML):
    """Images from memory, and tables that scroll on their own on a narrow screen."""

    images: Mapping[str, bytes]

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        token = tokens[idx]
        data = self.images.get(str(token.attrGet("src")))
        alt = Markup.escape(self.renderInlineAsText(token.children or [], options, env))
        if data is None:
            return f"<em>{alt}</em>"
        source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
        return f'<img src="{source}" alt="{alt}">'

    def table_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return '<div class="table"><table>\n'

    def table_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return "</table></div>\n"
