"""An adapter's folder: checked, its base found, both loaded by PEFT."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoint import USE
from trainer.common.errors import CheckpointError, shown
from trainer.data.dataset import DEFAULT_PROMPT

if TYPE_CHECKING:
    import torch

    from trainer.model.base import Base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Use:
    """How an adapter is used: what its own folder says."""

    base: str | None
    """The checkpoint it was trained on, as the run named it."""
    instruction: str = DEFAULT_PROMPT
    max_new_tokens: int = 256
    torch_dtype: str = "float32"


def use_of(folder: Path) -> Use:
    """What an adapter's folder says of its use.

    Raises:
        CheckpointError: it is not an adapter's folder, or one with pickled weights only.
    """
    config = _read(folder / CONFIG, folder)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}: {CONFIG} has peft_type {shown(config.get('peft_type'))}, but LORA is needed")
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"the adapter {str(folder)!r} has no {WEIGHTS}; pickled weights are not read")
    use = _read(folder / USE, folder) if (folder / USE).is_file() else {}
    known = {"instruction": str, "max_new_tokens": int, "torch_dtype": str}
    wrong = [name for name, kind in known.items() if name in use and not isinstance(use[name], kind)]
    if wrong:
        raise CheckpointError(f"{folder / USE}: {wrong[0]} is {shown(use[wrong[0]])}; correct it, or delete the file")
    return Use(base=config.get("base_model_name_or_path"), **{name: use[name] for name in known if name in use})


def _read(file: Path, folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        nested = next((str(path.parent) for path in sorted(folder.glob("**/" + CONFIG))[-1:]), None)
        hint = f"; did you mean {nested!r}?" if nested else "; name a folder in PEFT's format"
        raise CheckpointError(f"the adapter {str(folder)!r} has no {file.name}{hint}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: must be an object, but is a {type(found).__name__}")
    return found


def attach(base: Base, folder: Path) -> Any:
    """The base with the adapter, as `PeftModel.from_pretrained` gives it.

    Raises:
        CheckpointError: it does not fit the base.
    """
    from peft import PeftModel

    _check_fit(base, folder)
    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that Transformers 5.20 renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated.*")
        try:
            return PeftModel.from_pretrained(base.model, str(folder)).eval()
        except (ValueError, RuntimeError, OSError, TypeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise CheckpointError(f"the adapter {str(folder)!r} cannot be loaded: {reason}") from None


def _check_fit(base: Base, folder: Path) -> None:
    """Compare the shapes of all weights with the base's modules: PEFT leaves out what it does not find."""
    from safetensors import SafetensorError, safe_open

    sizes = {name: module.weight.shape for name, module in base.model.named_modules() if hasattr(module, "weight")}
    misfits = []
    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                name, _, letter = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
                shape = file.get_slice(key).get_shape()
                there = sizes.get(name)
                if there is None:
                    misfits.append(f"{name} is not a module of the model")
                elif shape[1 if letter == "A" else 0] != there[1 if letter == "A" else 0]:
                    misfits.append(f"{key} has shape {tuple(shape)}, the module {tuple(there)}")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    if misfits:
        more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
        raise CheckpointError(f"the adapter {str(folder)!r} does not fit the model {base.name!r}: {misfits[0]}{more}")


def load(model: str, folder: Path | None, *, dtype: torch.dtype, device: torch.device) -> tuple[Base, Any]:
    """(base, the model to caption with): to the last bit what Transformers and PEFT compute.

    Raises:
        UserError: model or adapter cannot be used.
    """
    from trainer.model.base import load_base

    base = load_base(model, dtype=dtype, device=device, fused=False)
    return base, base.model if folder is None else attach(base, folder)


def detach(base: Base, adapted: Any) -> None:
    """Leave the base as it was before `attach`."""
    adapted.unload()
    if hasattr(base.model, "peft_config"):
        del base.model.peft_config
    base.model.requires_grad_(False)
