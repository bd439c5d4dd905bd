"""Captions as tokens, as `pycocoevalcap` has them: Stanford's PTBTokenizer 3.4.1, lower case, without punctuation.

That tokenizer is a Java program. The rules here are those of it that captions meet, read off its output: for all texts
of tests/data/caption-metrics.json, with contractions, abbreviations, numbers, brackets, quotes and addresses, both
give the same tokens (tests/search/evaluation/test_metrics.py).
"""

from __future__ import annotations

import re

PUNCTUATION = frozenset(("''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "..", "...", ";"))
"""Tokens that pycocoevalcap takes out. Its list has brackets too, in upper case, which never match: they stay."""
REPLACED = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"€": "$", "£": "#", "–": "--", "—": "--", "…": "..."},
    **{"“": "``", "”": "''", "„": "``", "’": "'", "‘": "`"},
}
"""Signs by how the tokenizer writes them."""
ABBREVIATIONS = frozenset(
    (
        *(
            "mr",
            "mrs",
            "ms",
            "dr",
            "prof",
            "st",
            "mt",
            "ft",
            "no",
            "vs",
            "etc",
            "inc",
            "co",
            "corp",
            "ltd",
            "jr",
            "sr",
        ),
        *("jan", "feb", "mar", "apr", "jun", "jul", "aug", "sept", "sep", "oct", "nov", "dec", "ave", "rd", "sr"),
    )
)
"""Words that keep their full stop, as far as captions have them."""
SPLIT = {
    **{"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me"},
    **{"gimme": "gim me", "'tis": "'t is", "'twas": "'t was"},
}

PIECE = re.compile(
    r"""
    (?:https?://|www\.)[^\s"<>()]*[^\s"<>().,;:!?'] | [\w.+-]+@[\w-]+(?:\.[\w-]+)+      # addresses
    | <[a-z/][^\s<>]*>                                                # tags
    | (?:[a-z]\.){2,}                                                 # u.s., e.g.
    | '(?:tis|twas)\b | 'cause\b | '\d\ds\b | @\w+ | \#[^\W\d_]\w* | \#{2,}   # words that begin with a sign
    | [^\W\d_]+(?:&[^\W\d_]+)+                                        # at&t
    | [od]['’][^\W\d_]{2,}                                            # o'clock, o'brien
    | \d+/\d+(?:-[^\W_]+)*(?!\w)                                           # fractions
    | (?:\d+(?:[.,:]\d+)*|[.]\d+(?:[.,:]\d+)*)(?:-[^\W_]+)*(?:[^\W_])*(?:-[^\W_]+)*     # 1,200  3.5  10:30  20m  2-3
    | [^\W_]+(?:(?:[-/]|\.(?=[^\W\d_]{2}))[^\W_]+)*                   # words, hyphens and slashes between them
    | \.{2,} | -{2,} | [?!]{2,} | ''+ | ``+ | \S
    """,
    re.VERBOSE,
)
ENDING = re.compile(r"n't|'(?:s|m|d|re|ve|ll|n)(?![^\W_])|(?<=[^\W_])'(?=\s|$)")
"""Endings that are tokens of their own."""


def tokenize(caption: str) -> list[str]:
    """The tokens of a caption, without punctuation."""
    text = caption.lower().replace("’", "'")
    found: list[str] = []
    at = 0
    while match := PIECE.search(text, at):
        piece, at = match.group(), match.end()
        # Endings: don't -> do n't, it's -> it 's.
        if piece.endswith("n") and text.startswith("'t", at) and not text[at + 2 : at + 3].isalpha():
            found += [piece[:-1]] * (len(piece) > 1) + ["n't"]
            at += 2
            continue
        ending = ENDING.match(text, at) if piece[-1].isalnum() else None
        # A full stop belongs to an abbreviation, and to a single letter.
        if text.startswith(".", at) and (piece in ABBREVIATIONS or (len(piece) == 1 and piece.isalpha())):
            piece, at = piece + ".", at + 1
        if piece.startswith(("..", "--")):
            piece = piece[:2]
        found += SPLIT.get(piece, REPLACED.get(piece, piece)).split()
        if ending is not None:
            found.append(ending.group())
            at = ending.end()
    return [token for token in found if token not in PUNCTUATION]
