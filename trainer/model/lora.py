"""LoRA for several runs at once on one frozen base: each run's weights in one flat tensor, applied in adapted modules.

A pass holds the samples of several runs one after the other. The forward of an adapted module is replaced by one that
adds each run's own adapter to that run's rows, with its own rank, scaling and dropout (Hu et al. 2021):
y_k += s_k drop(x_k) A_k' B_k'. The rows of different runs never meet: a value that is not finite in one changes no bit
of the others.

One autograd node for a module does the arithmetic of the base and of all runs, and writes the runs' gradients where
AdamW finds them. Initial values and file format are PEFT's, which tests compare with (tests/trainer/test_pack.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from trainer.common.errors import ModelError
from trainer.config import TrainConfig
from trainer.model import peft_format
from trainer.model.library_private import forward_attribute
from trainer.model.ragged import current_input_rows

UNIFORM = ("cuda",)
"""Kinds of devices on which dropout is drawn with the rate as a tensor: what is recorded once can serve other runs."""

STATE = ("exp_avg", "exp_avg_sq")
"""AdamW's moments, as its state names them."""


@dataclass(frozen=True)
class Pair:
    """One module's A and B with their gradients: views of the adapter's flat tensors, made once, not at every use.

    B lies there transposed. On a CPU, BLAS takes two to four times as long for a product of many rows with a matrix of
    a few columns if these are contiguous, as two products, for the gradients of B and x, would be with PEFT's B.
    """

    a: torch.Tensor
    """(r, d_in)."""
    a_t: torch.Tensor
    b: torch.Tensor
    """(d_out, r)."""
    b_t: torch.Tensor
    grad_a: torch.Tensor
    grad_b_t: torch.Tensor
    """(r, d_out)."""


@dataclass(frozen=True)
class Named:
    """One weight of an adapter with its gradient and moments, for inspection."""

    weight: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor | None
    exp_avg_sq: torch.Tensor | None


class Adapter:
    """One run's LoRA weights, gradients and optimizer.

    All weights are one flat parameter, so that norm, clipping and update are a few operations for a run, not for every
    tensor. The optimizer is PyTorch's AdamW.
    """

    def __init__(self, model: Any, config: TrainConfig) -> None:
        """A fresh adapter, with PEFT's initial values for this seed.

        Raises:
            ModelError: a target module that the model lacks.
        """
        self.config = config
        self.scale = config.lora_alpha / config.lora_r
        self.dropout = config.lora_dropout
        # Initial values, copied to one flat tensor.
        initial, self.modules = peft_format.initial_values(model, config)
        first = next(iter(initial.values()))
        _refuse_scattered(model, self.modules)
        self.shapes = {name: p.shape for name, p in initial.items()}
        self.weights = torch.empty(sum(p.numel() for p in initial.values()), dtype=first.dtype, device=first.device)
        self.grads = torch.zeros_like(self.weights)
        weights, grads = self._split(self.weights), self._split(self.grads)
        for name, p in initial.items():
            weights[name].copy_(p)
        self.in_language_model = any(name.startswith("language_model.") for name in self.modules)
        # Its views by module.
        self.pairs: dict[str, Pair] = {}
        for module in self.modules:
            a, b = (f"base_model.model.{module}.lora_{x}.default.weight" for x in "AB")
            self.pairs[module] = Pair(weights[a], weights[a].t(), weights[b], weights[b].t(), grads[a], grads[b].t())
        # The optimizer on it.
        self.parameter = nn.Parameter(self.weights)
        self.parameter.grad = self.grads
        # The fused kernel computes in float32 whatever the dtype, and float16 has to fail as it did in the hand-run.
        self.fused = self.weights.dtype in (torch.float32, torch.float64)
        self.optimizer = torch.optim.AdamW(
            [self.parameter],
            lr=config.learning_rate,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=self.fused,
            foreach=False,
        )
        self.generator = torch.Generator(first.device)

    def __len__(self) -> int:
        return self.weights.numel()

    def _split(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat tensor as the weights' views, in PEFT's shapes; see `Pair` for how B lies in it."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: part.view(shape[1], shape[0]).t() if ".lora_B." in name else part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def named(self) -> dict[str, Named]:
        """All weights by PEFT's names, in a fixed order."""
        state = self.optimizer.state.get(self.parameter, {})
        moments: dict[str, dict[str, torch.Tensor]] = {k: self._split(state[k]) for k in STATE if k in state}
        weights, grads = self._split(self.weights), self._split(self.grads)
        return {
            name: Named(weights[name], grads[name], *(moments[k][name] if k in moments else None for k in STATE))
            for name in self.shapes
        }

    def updates(self) -> int:
        """Number of updates that AdamW has made."""
        state = self.optimizer.state.get(self.parameter, {})
        return int(state["step"]) if "step" in state else 0

    def save(self, folder: Path, base_name: str) -> None:
        """The adapter in PEFT's format: loads with `PeftModel.from_pretrained(base, folder)`."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        peft_format.lora_config(self.config, self.modules, base_name).save_pretrained(str(folder))
        weights = {name.replace(".default.", "."): w.contiguous() for name, w in self._split(self.weights).items()}
        save_file(weights, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Set the weights from a folder written by `save`, bit for bit.

        Raises:
            ModelError: an adapter for other modules.
        """
        from safetensors.torch import load_file

        stored = load_file(str(folder / "adapter_model.safetensors"))
        named = {name.replace(".default.", "."): w for name, w in self._split(self.weights).items()}
        if named.keys() != stored.keys():
            missing, extra = sorted(named.keys() - stored.keys()), sorted(stored.keys() - named.keys())
            raise ModelError(f"{folder}: the adapter does not fit; missing: {missing[:5]}, unknown: {extra[:5]}")
        for name, weight in named.items():
            weight.copy_(stored[name])

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """AdamW's state by name: its moments as flat tensors, B in PEFT's order, and the number of its updates."""
        state = self.optimizer.state.get(self.parameter, {})
        moments = {key: torch.cat([v.reshape(-1) for v in self._split(state[key]).values()]) for key in STATE if state}
        return {key: moments.get(key, value).detach() for key, value in state.items()}

    def restore_optimizer(self, stored: Mapping[str, torch.Tensor]) -> None:
        """Set AdamW's state from a result of `optimizer_tensors`, bit for bit."""
        if stored:
            device = self.weights.device
            # Where AdamW itself keeps them: the count beside the weights if fused, else on the host.
            there = {key: value.to(device) if key in STATE or self.fused else value for key, value in stored.items()}
            for key in STATE:
                moment = torch.empty_like(self.weights, dtype=there[key].dtype)
                parts = there[key].split([shape.numel() for shape in self.shapes.values()])
                for view, part, shape in zip(self._split(moment).values(), parts, self.shapes.values(), strict=True):
                    view.copy_(part.view(shape))
                there[key] = moment
            self.optimizer.state[self.parameter] = there


def _refuse_scattered(model: Any, modules: Sequence[str]) -> None:
    """Refuse modules on other devices than the Q-Former's, in a base that is spread: an adapter is one flat tensor."""
    here = next(model.qformer.parameters()).device
    elsewhere = [name for name in modules if model.get_submodule(name).weight.device != here]
    if elsewhere:
        raise ModelError(
            f"device_map=auto has put {len(elsewhere)} of the {len(modules)} adapted modules on other devices than "
            f"the Q-Former's ({here}), for example {elsewhere[0]!r}; adapt Q-Former modules only (the default "
            "target_modules), or use a device that holds the whole base"
        )


@dataclass
class Segment:
    """One run's share of a pass."""

    adapter: Adapter
    start: int
    """First sample."""
    stop: int
    first_token: int
    """First of its label tokens."""
    last_token: int


class OfAllRuns(Protocol):
    """The adapters of all runs of a pass, computed together: `trainer.model.stacked`."""

    @property
    def modules(self) -> Mapping[str, Any]: ...

    def apply(
        self, anchor: torch.Tensor | None, x: torch.Tensor, module: nn.Linear, name: str, sizes: list[int], train: bool
    ) -> torch.Tensor: ...


class Hooks:
    """Replaces the forward of adapted modules by one that adds the adapters of `segments`, the runs of the pass."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.segments: Sequence[Segment] = ()
        self.training = False
        self.stack: OfAllRuns | None = None
        """Of the segments' adapters, where they are computed together."""
        self.all_stacked = False
        """Whether also modules in which the runs have different numbers of rows go through the stack."""
        self._covered: dict[str, tuple[nn.Module, str, Any, bool]] = {}
        self._anchor: torch.Tensor | None = None

    def cover(self, modules: Iterable[str]) -> None:
        """Replace the forward of those modules where it has not been replaced yet."""
        for name in modules:
            if name not in self._covered:
                module = self.model.get_submodule(name)
                attribute = forward_attribute(module)
                original = getattr(module, attribute)
                # One that is there already, of other hooks, is put back by `remove`.
                self._covered[name] = (module, attribute, original, attribute in vars(module))
                setattr(module, attribute, partial(self._apply, name, module, original))
                if self._anchor is None:
                    # The weights are not inputs of the graph (their gradients are written straight to their place), so
                    # another input has to require a gradient.
                    self._anchor = torch.zeros((), device=module.weight.device, requires_grad=True)

    @contextmanager
    def recording(self, segments: Sequence[Segment], stack: OfAllRuns, *, training: bool) -> Iterator[None]:
        """Within, the runs of a pass that may be recorded: all their modules go through the stack."""
        anchor = self._anchor
        if anchor is not None:
            # The old one may belong to a graph of autograd that began on another stream.
            self._anchor = torch.zeros_like(anchor, requires_grad=True)
        self.segments, self.training, self.stack, self.all_stacked = segments, training, stack, True
        try:
            yield
        finally:
            self.segments, self.stack, self.all_stacked, self._anchor = (), None, False, anchor

    def remove(self) -> None:
        """Leave the base as it was."""
        for module, attribute, original, was_there in self._covered.values():
            if was_there:
                setattr(module, attribute, original)
            else:
                delattr(module, attribute)  # uncovers the class's own
        self._covered.clear()

    def _apply(self, name: str, module: nn.Linear, original: Callable[..., Any], x: torch.Tensor) -> Any:
        segments = self.segments
        if not any(name in segment.adapter.pairs for segment in segments):
            return original(x)
        stack = self.stack
        if stack is not None and name in stack.modules:
            sizes = _sizes(segments, x)
            if self.all_stacked or len(set(sizes)) == 1:
                return stack.apply(self._anchor, x, module, name, sizes, self.training)
        return _Lora.apply(self._anchor, x, module.weight, module.bias, name, segments, self.training)  # type: ignore[no-untyped-call]


class _Lora(torch.autograd.Function):
    """x W' + bias, and s drop(x) A' B' added to the rows of each segment.

    The operations are small, so that their number decides the time: rows are split once for all segments, and products
    are added in place to the sums that they belong to, such as the base's gradient for x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        _anchor: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        name: str,
        segments: Sequence[Segment],
        training: bool,
    ) -> torch.Tensor:
        sizes = _sizes(segments, x)
        rows = x.reshape(-1, x.shape[-1])
        y = nn.functional.linear(rows, weight, bias)
        mixed = _is_mixed(segments, weight)
        lows: list[torch.Tensor | None] = []
        masks: list[torch.Tensor | None] = []
        for segment, own, out in zip(segments, _split(rows, sizes), _split(y, sizes), strict=True):
            adapter, pair = segment.adapter, segment.adapter.pairs.get(name)
            low, mask = None, None
            if pair is not None:
                if mixed:
                    own = own.to(pair.a.dtype)
                if training and adapter.dropout:
                    mask = _dropout_mask(adapter, own)
                    own = own * mask
                low = torch.mm(own, pair.a_t)
                _add_product(out, low, pair.b_t, adapter.scale, mixed)
            lows.append(low)
            masks.append(mask)
        # Masks are as large as x, and freed after this node's backward pass. `lows` are small and never changed: kept
        # without autograd's check of versions, which would cost time for each segment.
        ctx.save_for_backward(weight, rows, *(masks if any(mask is not None for mask in masks) else ()))
        ctx.name, ctx.segments, ctx.sizes, ctx.shape, ctx.lows = name, segments, sizes, x.shape, lows
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, rows, *masks = ctx.saved_tensors
        name, sizes = ctx.name, ctx.sizes
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = torch.mm(grad, weight) if ctx.needs_input_grad[1] else None
        backs = [None] * len(sizes) if grad_x is None else _split(grad_x, sizes)
        masks = masks or [None] * len(sizes)
        mixed = _is_mixed(ctx.segments, weight)
        for segment, own, above, back, low, mask in zip(
            ctx.segments, _split(rows, sizes), _split(grad, sizes), backs, ctx.lows, masks, strict=True
        ):
            adapter = segment.adapter
            pair, scale = adapter.pairs.get(name), adapter.scale
            if pair is None:
                continue
            if mixed:
                own, above = own.to(pair.a.dtype), above.to(pair.a.dtype)
            below = torch.mm(above, pair.b)
            pair.grad_b_t.addmm_(low.t(), above, alpha=scale)
            pair.grad_a.addmm_(below.t(), own if mask is None else own * mask, alpha=scale)
            if back is not None and mask is None:
                _add_product(back, below, pair.a, scale, mixed)
            elif back is not None:
                back.addcmul_(torch.mm(below, pair.a), mask, value=scale)
        return None, None if grad_x is None else grad_x.view(ctx.shape), None, None, None, None, None


def _is_mixed(segments: Sequence[Segment], weight: torch.Tensor) -> bool:
    """Whether the adapters are in another dtype than the base: `base_dtype`, which the runs of a pass share."""
    return segments[0].adapter.weights.dtype != weight.dtype


def _add_product(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor, scale: float, mixed: bool) -> None:
    """total += scale * one @ other, in place; the sum is made in the adapter's dtype and rounded once."""
    if mixed:
        total.add_(torch.mm(one, other), alpha=scale)
    else:
        total.addmm_(one, other, alpha=scale)


def _sizes(segments: Sequence[Segment], x: torch.Tensor) -> list[int]:
    """Number of rows of each segment in an input: (samples, ..., features), or (N, features), see `input_rows`."""
    if x.dim() == 2:
        starts = current_input_rows().starts
        return [starts[segment.stop] - starts[segment.start] for segment in segments]
    each = x.numel() // (x.shape[0] * x.shape[-1])
    return [(segment.stop - segment.start) * each for segment in segments]


def _split(rows: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
    """The rows of each segment, as views. Tensor.split does the same after 10 us of Python."""
    return rows.split_with_sizes(sizes) if len(sizes) > 1 else (rows,)


def by_uniform(device: torch.device) -> bool:
    """Whether dropout compares uniform numbers with the rate, which may then be a tensor, on this device."""
    return device.type in UNIFORM


def _dropout_mask(adapter: Adapter, rows: torch.Tensor) -> torch.Tensor:
    """The factors of a run's rows, (rows, features): 0, or 1 / (1 - p)."""
    keep = 1.0 - adapter.dropout
    mask = torch.empty_like(rows)
    if by_uniform(rows.device):
        mask.uniform_(generator=adapter.generator)
        return torch.lt(mask, keep, out=mask).mul_(1.0 / keep)
    return mask.bernoulli_(keep, generator=adapter.generator).div_(keep)
