"""`python -m trainer.caption IMAGE... --adapter DIR`: captions by a base with an adapter, one an image."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from trainer import preload
from trainer.captions.inputs import Item, items_of
from trainer.common import cli
from trainer.common.errors import ConfigError, DataError
from trainer.common.progress import bar
from trainer.data.images import open_image
from trainer.model import locate

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Images, folders of images, patterns, or data folders.")
    ],
    adapter: Annotated[Path | None, typer.Option(help="The adapter's folder; without it the base captions.")] = None,
    model: Annotated[str | None, typer.Option(help="The base; by default the adapter's own.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Asked of every image; by default the data's own, or what the adapter learnt.")
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, max=64, help="Beams of the beam search; 1 is greedy.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Longest caption in tokens; by default the adapter's own.")
    ] = None,
    min_new_tokens: Annotated[int | None, typer.Option(min=0, max=4096, help="Shortest caption.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Above 0, beams prefer longer captions.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1, words are repeated less.")] = None,
    no_repeat_ngram_size: Annotated[int | None, typer.Option(min=0, help="No n words twice in a caption.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Images at once.")] = 8,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Of the base; the adapter's by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line.")] = False,
) -> None:
    """Caption images. One line an image: its path, a tab, the caption.

    Exit codes: 0 all captioned; 2 wrong input, or an image that cannot be read: it is named, and the others are
    captioned nevertheless.
    """
    # All that can be wrong is found before the base is loaded.
    if repetition_penalty is not None and not 0 < repetition_penalty < math.inf:
        raise ConfigError(f"--repetition-penalty must be greater than 0 and finite, but got {repetition_penalty}")
    if length_penalty is not None and not math.isfinite(length_penalty):
        raise ConfigError(f"--length-penalty must be finite, but got {length_penalty}")
    if instruction is not None and not instruction.strip():
        raise ConfigError("--instruction is empty; leave it out for the data's own, or what the adapter learnt")
    if adapter is None and model is None:
        raise ConfigError("name an adapter (--adapter), or a model to caption without one (--model)")
    items, problems = items_of(images)
    preload.import_libraries()
    from trainer import runtime
    from trainer.captions.adapter import Use, load, use_of
    from trainer.captions.generate import Captioner, Decoding, in_batches

    use = use_of(adapter) if adapter is not None else Use(base=model)
    name = model or use.base
    if name is None:
        raise ConfigError(f"the adapter {str(adapter)!r} does not say which base it was trained on; name it: --model")
    locate.check(name)
    longest = max_new_tokens or use.max_new_tokens
    if min_new_tokens is not None and min_new_tokens > longest:
        raise ConfigError(f"--min-new-tokens is {min_new_tokens}, more than the longest caption has: {longest}")
    decoding = Decoding(
        max_new_tokens=longest,
        min_new_tokens=min_new_tokens,
        num_beams=num_beams,
        length_penalty=length_penalty,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
    )
    place, kind = runtime.resolve_device(device), runtime.DTYPES[dtype or use.torch_dtype]
    base, loaded = load(name, adapter, dtype=kind, device=place)
    captioner = Captioner(loaded, base.processor, place, kind, decoding)
    # Caption, and print in the order of the images as far as they are known.
    asked = [(partial(open_image, item.image), instruction or item.instruction or use.instruction) for item in items]
    done: dict[int, str | Exception] = {}
    printed = 0
    with bar("captioning") as show:
        for number, text in in_batches(captioner, asked, batch_size):
            done[number] = text
            show(len(done), len(items))
            while printed in done:
                printed += _print(items[printed], asked[printed][1], done[printed], as_json=as_json)
    bad = sum(isinstance(each, Exception) for each in done.values())
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if bad or problems:
        raise DataError(f"{bad + len(problems)} of {len(items) + len(problems)} images could not be captioned")


def _print(item: Item, instruction: str, result: str | Exception, *, as_json: bool) -> Literal[1]:
    if isinstance(result, Exception):
        print(f"error: {result}", file=sys.stderr)
    elif as_json:
        found: dict[str, str | Sequence[str]] = {"image": str(item.image), "caption": result}
        found |= {"instruction": instruction, **({"references": item.references} if item.references else {})}
        print(json.dumps(found, ensure_ascii=False), flush=True)
    else:
        print(f"{item.image}\t{result}", flush=True)
    return 1


if __name__ == "__main__":
    cli.run(app)
