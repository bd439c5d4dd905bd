"""A checkpoint's tokenizers as text is counted with them. Needs `tokenizers` alone, neither torch nor Transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.errors import ModelError, shown
from trainer.config import EMBEDDED

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IMAGE = "<image>"
"""What stands for a picture's tokens: Transformers' InstructBLIP processor adds it to every tokenizer by itself."""
EXAMPLE = 60
"""Most characters of an example."""


@dataclass(frozen=True)
class Words:
    """A tokenizer, as `batches.Tokenizer` uses it."""

    tokenizer: Tokenizer
    unknown: int | None
    """Id of `<unk>`; None where every byte has a token."""
    separator: str = ""
    """What stands between prompt and caption."""
    special: tuple[str, ...] = (IMAGE,)
    """Texts that are read as one special token each, wherever they stand; the unknown token is none of them."""


@dataclass(frozen=True)
class Lacking:
    """How much of a set of texts a tokenizer lacks."""

    texts: int = 0
    share: float = 0.0
    """Of the tokens or of the characters, whichever is more: several unknown characters may be one token, and where
    there is no such token they vanish."""
    with_unknown: int = 0
    """Texts with at least one unknown token or character."""
    example: str = ""
    """The beginning of the text that has most of it."""
    example_read: str = ""
    """What the model reads in its place."""


class Count:
    """Counts what a tokenizer lacks, text by text."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self.tokens = 0
        self._unknown = self._characters = self._lost = self._texts = self._with = 0
        self._worst, self._example = 0.0, ("", "")

    def add(self, text: str, times: int) -> int:
        """Count a text that is there so many times; returns its number of tokens, special ones not added."""
        words = self._words
        whole = words.separator + text
        encoding = words.tokenizer.encode(whole, add_special_tokens=False)
        ids = encoding.ids
        visible = len(text) - text.count(" ")
        unknown = 0 if words.unknown is None else ids.count(words.unknown)
        missing = _not_read(whole, encoding, words.unknown) if unknown or words.unknown is None else 0
        self._texts += times
        self.tokens, self._unknown = self.tokens + times * len(ids), self._unknown + times * unknown
        self._characters, self._lost = self._characters + times * visible, self._lost + times * missing
        if unknown or missing:
            self._with += times
            share = max(unknown / max(1, len(ids)), missing / max(1, visible))
            if share > self._worst:
                self._worst = share
                read = words.tokenizer.decode(ids, skip_special_tokens=False)
                self._example = (beginning(text), beginning(read))
        return len(ids)

    def result(self) -> Lacking:
        """What was counted so far."""
        share = max(self._unknown / max(1, self.tokens), self._lost / max(1, self._characters))
        return Lacking(self._texts, share, self._with, *self._example)


def special_pattern(words: Words) -> re.Pattern[str]:
    """Finds the tokenizer's special tokens in a text."""
    return re.compile("|".join(re.escape(token) for token in dict.fromkeys((IMAGE, *words.special))))


def words_of(model: str) -> Words | None:
    """The tokenizer of a checkpoint's language model, None where it has no tokenizer.json at hand.

    Raises:
        ModelError: the file cannot be read.
    """
    return _read(model, "tokenizer.json")


def qformer_words_of(model: str) -> Words | None:
    """The tokenizer of a checkpoint's Q-Former, None where it has no tokenizer.json at hand.

    Raises:
        ModelError: the file cannot be read.
    """
    from trainer.model.files import QFORMER

    return _read(model, f"{QFORMER}/tokenizer.json")


def qformer_room(model: str) -> int | None:
    """Most tokens that a checkpoint's Q-Former reads of an instruction; None where its config.json does not say."""
    config = _file_of(model, "config.json")
    if config is None:
        return None
    found = json.loads(config.read_text(encoding="utf-8")).get("qformer_config") or {}
    room = found.get("max_position_embeddings")
    return room if isinstance(room, int) else None


def _read(model: str, name: str) -> Words | None:
    from tokenizers import Tokenizer

    file, config = _file_of(model, name), _file_of(model, "config.json")
    if file is None:
        return None
    try:
        content = file.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(content)
        parsed = json.loads(content)
        whole = json.loads(config.read_text(encoding="utf-8")) if config is not None else {}
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return words(tokenizer, parsed, decoder_only=bool(whole.get("use_decoder_only_language_model")))
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself for a file that it cannot read
        raise ModelError(f"the model {shown(model)}: its {name} cannot be read ({error})") from None


def words(tokenizer: Tokenizer, content: dict[str, Any], *, decoder_only: bool) -> Words:
    """A tokenizer with what counting needs; `content` is its tokenizer.json."""
    model, unknown = content["model"], None
    if isinstance(model.get("unk_id"), int):  # Unigram
        unknown = model["unk_id"]
    elif isinstance(model.get("unk_token"), str):
        unknown = tokenizer.token_to_id(model["unk_token"])
    # As batches.Tokenizer: SentencePiece's kind puts a space before a text by itself, a byte-level one does not.
    pair = [*tokenizer.encode("a", add_special_tokens=False).ids, *tokenizer.encode("b", add_special_tokens=False).ids]
    separator = " " if decoder_only and "ab" in tokenizer.decode(pair) else ""
    return Words(tokenizer, unknown, separator, tuple(_special(content, unknown)))


def _special(content: dict[str, Any], unknown: int | None) -> Iterator[str]:
    yield IMAGE
    for token in content.get("added_tokens") or ():
        if token.get("special") and token.get("id") != unknown and token.get("content"):
            yield token["content"]


def _file_of(model: str, name: str) -> Path | None:
    """A file of a checkpoint that is a folder or lies in the hub's cache."""
    from trainer.model.locate import locate

    place = Path(locate(model))
    if place.is_dir() or model == EMBEDDED:
        return place / name if (place / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, name)
    return Path(cached) if isinstance(cached, str) else None


def _not_read(text: str, encoding: Any, unknown: int | None) -> int:
    """Visible characters that no known token stands for."""
    read = bytearray(len(text))
    for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if number != unknown:
            read[start:end] = b"\1" * (end - start)
    return sum(not seen and not character.isspace() for seen, character in zip(read, text, strict=True))


def beginning(text: str) -> str:
    """The text, cut where it is too long for an example."""
    return text if len(text) <= EXAMPLE else f"{text[:EXAMPLE]}..."
