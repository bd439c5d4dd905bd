"""Whether a checkpoint's tensors are those of its model: all of them, no others, each of its shape.

Transformers fills what a checkpoint lacks with random values and says so in a log line. Here that is an error, found
from the headers of the files alone (`check_headers`), and again in what was loaded (`check_loaded`). Which names count
is Transformers' own answer both times: its renamings of published checkpoints, the weights that the config ties.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from trainer.common.errors import ModelError
from trainer.model.files import listed

NOT_WEIGHTS = r"(^|\.)(position_ids|inv_freq|masked_bias)$"
"""Names of tensors that older versions of Transformers saved though they follow from the configuration."""


def check_headers(name: str, config: Any, shapes: Mapping[str, tuple[int, ...]], *, untied: bool) -> Any:
    """Hold tensors' names and shapes against the model of an `InstructBlipConfig`; nothing is read or allocated.

    Args:
        name: of the checkpoint, for messages.
        config: as Transformers read it.
        shapes: of all tensors.
        untied: whether config.json says that the head is a weight of its own (`files.has_own_head`).

    Returns:
        The model on PyTorch's meta device, without values.

    Raises:
        ModelError: tensors are missing, left over or of other shapes.
    """
    from transformers import InstructBlipForConditionalGeneration

    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model, info = InstructBlipForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        use_safetensors=True,  # nothing is read from files here, and no other kind may ever be
        device_map={"": "meta"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported by `check_loaded`, all at once
    )
    check_loaded(name, model, info, shapes, untied=untied)
    return model


def check_loaded(name: str, model: Any, info: Mapping[str, Any], names: Collection[str], *, untied: bool) -> None:
    """Refuse a model of which Transformers did not find every weight, by what `output_loading_info` says.

    Args:
        name: of the checkpoint, for messages.
        model: as it was loaded.
        info: of its loading.
        names: of all tensors in the checkpoint.
        untied: as in `check_headers`.

    Raises:
        ModelError: it names the tensors and says how many they are.
    """
    missing = sorted({*info["missing_keys"], *(_tied_though_untied(model, names) if untied else ())})
    ignored = [NOT_WEIGHTS]
    for module in model.modules():  # T5 names leftovers of its published checkpoints
        ignored += getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    own = {key for key, _ in model.named_buffers()}
    left_over = sorted(
        key for key in info["unexpected_keys"] if key not in own and not any(re.search(p, key) for p in ignored)
    )
    others = sorted((key, tuple(there), tuple(needed)) for key, there, needed in info["mismatched_keys"])
    lines = []
    if missing:
        lines.append(f"{_tensors(missing)} missing: {listed(missing)}")
    if left_over:
        lines.append(f"{_tensors(left_over)} not the model's: {listed(left_over)}{_prefix(missing, left_over)}")
    if others:
        keys = [key for key, _, _ in others]
        shapes = [f"{key} is {there}, but {needed} is needed" for key, there, needed in others]
        lines.append(f"{_tensors(keys)} of another shape: {listed(shapes)}")
    lines += [str(error) for error in info.get("error_msgs", ())]
    if lines:
        raise ModelError(
            f"the model {name!r}: its weights are not those of its config.json, and what is missing would be random:"
            + "".join(f"\n  - {line}" for line in lines)
        )


def _tied_though_untied(model: Any, names: Collection[str]) -> Iterator[str]:
    """Head or embeddings that a checkpoint lacks, and that Transformers replaced by one another."""
    head = next(f"{name}.weight" for name, module in model.named_modules() if module is model.get_output_embeddings())
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    if head not in tied:
        return
    source = tied[head]
    if head not in names:
        yield head
    if not {source, *(target for target, of in tied.items() if of == source and target != head)} & set(names):
        yield source


def _tensors(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _prefix(missing: list[str], left_over: list[str]) -> str:
    """A remark, if the tensors that are left over are missing ones with a common beginning before their names."""
    wanted = set(missing)
    for key in missing:
        prefix = left_over[0].removesuffix(key)
        if prefix != left_over[0] and all(
            each.startswith(prefix) and each.removeprefix(prefix) in wanted for each in left_over
        ):
            return f"; these are missing ones with {prefix!r} before their names"
    return ""
