"""Text from data as Markdown: it shows as it is, and nothing in it ends a code span or block."""

from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from search.markdown import code, escape, fenced, slug


def _shown(text: str) -> str:
    """What a reader sees; fails if anything but text comes out."""
    inline = [t for t in MarkdownIt("commonmark", {"html": True}).enable("table").parse(text) if t.type == "inline"]
    children = [c for t in inline for c in t.children or ()]
    assert {c.type for c in children} <= {"text", "text_special", "softbreak"}
    return "".join(c.content for c in children)


@given(st.text())
def test_escaped_text_shows_as_it_is(text: str) -> None:
    shown = " ".join(_shown(f"- a {escape(text)} z").split())
    assert shown == " ".join(f"a {text} z".replace("\x00", "\ufffd").split())


@given(st.text(min_size=1))
def test_nothing_ends_a_code_span_or_block(text: str) -> None:
    (inline,) = [t for t in MarkdownIt("commonmark").parse(f"a {code(text)} z") if t.type == "inline"]
    assert [t.type for t in inline.children or ()] == ["text", "code_inline", "text"]
    assert [t.type for t in MarkdownIt("commonmark").parse(fenced(text))] == ["fence"]


def test_slugs_are_githubs() -> None:
    assert slug("Experiment 3: 5b (too slow)") == "experiment-3-5b-too-slow"
    assert slug("实验 3: 激进参数 (过拟合)") == "实验-3-激进参数-过拟合"
