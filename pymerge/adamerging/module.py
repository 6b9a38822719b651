"""`AdaMerging`: a merged model whose coefficients can be learned (Yang et al. 2024)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from pymerge.adamerging.arguments import check_arguments, model_names
from pymerge.adamerging.coefficients import Coefficients, initial_coefficients
from pymerge.adamerging.correlations import correlations as _correlations
from pymerge.adamerging.fit import fit as _fit
from pymerge.adamerging.layers import Granularity, group_layers, load_tensors, match_layers
from pymerge.adamerging.ops import merged_layer, merged_packed_layer
from pymerge.adamerging.packed import pack_trimmed
from pymerge.adamerging.presets import PRESETS
from pymerge.adamerging.save import save as _save
from pymerge.adamerging.save import save_coefficients as _save_coefficients
from pymerge.errors import RequestError, nearest

__all__ = ["AdaMerging"]

Tensor = torch.Tensor
Model = Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]


class AdaMerging(nn.Module):
    """A merged model with learnable coefficients, in place of the architecture that it wraps.

        theta^l = theta_0^l + sum_k lambda_k^l tau_k^l,  tau_k = theta_k - theta_0

    AdaMerging (Yang et al. 2024, eq. 3). Calling it merges and runs the merged model: each layer is
    one pass over the checkpoints, and so is its gradient. Its only parameter is the table of
    coefficients, `raw_coefficients` [models, groups]; no task vector is stored, and checkpoints in
    bf16 stay in bf16.

    >>> net = nn.Linear(2, 2)
    >>> tuned = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    >>> ada = AdaMerging(net, net.state_dict(), [tuned], init=0.5)
    >>> ada(torch.ones(3, 2)).shape
    torch.Size([3, 2])
    """

    raw_coefficients: nn.Parameter
    _index: Tensor

    def __init__(
        self,
        model: nn.Module,
        base: Model,
        models: Sequence[Model],
        granularity: Granularity = "layer",
        trimmed: bool = False,
        init: float | Sequence[float] | Tensor = 0.3,
        preset: str = "official",
        *,
        heads: Sequence[Callable[..., Any]] | None = None,
        clamp: tuple[float, float] | str | None = "preset",
        density: float = 0.2,
        names: Sequence[str] | None = None,
        fixed: str = "equal",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Wrap an architecture.

        Args:
            model: the architecture, any module, in the mode (train or eval) that it shall run in.
                Its own parameters are not used, so it may be on the meta device.
            base: theta_0: a state dict, a module, or the path of a checkpoint (which is mapped, not
                read). Tensors that the architecture lacks are ignored; `save` writes those of a
                checkpoint unchanged.
            models: theta_1 .. theta_K, in the same forms.
            granularity: which tensors share coefficients: "layer" (each tensor has its own, as in
                the authors' code), "module", "task" (all), or a list of regular expressions; see
                `group_layers`.
            trimmed: AdaMerging++: first trim the task vectors and elect their signs as TIES does,
                and store them as bit masks and values.
            init: initial lambda: a number, one for each model, or a table [models, groups].
            preset: "official" (all parameters, coefficients clamped to [0, 1] wherever they are
                used) or "fusion_bench" (parameters that require a gradient, no clamping); it also
                sets the defaults of `fit`. See docs/adamerging.md.
            heads: for each task, a function or module that computes logits from the model's output.
                Heads are not trained (parameters of modules are frozen).
            clamp: (lowest, highest) coefficient, or None; default: the preset's. Outside the range
                the gradient is 0, as with `torch.clamp`; at its ends it is 1.
            density: share of each task vector that `trimmed` keeps.
            names: unique names of the models, for tables; default: those of their paths, or
                "model 0", ...
            fixed: tensors that are not merged (buffers; frozen parameters with preset
                "fusion_bench") must be "equal" in all models, or are taken from the "base"
                regardless of the models.
            dtype: dtype of the merged tensors; default: the architecture's.

        Raises:
            RequestError: models that do not fit the architecture, or values out of range; lists
                every problem.
        """
        super().__init__()
        check_arguments(
            model,
            models,
            granularity=granularity,
            preset=preset,
            heads=heads,
            clamp=clamp,
            density=density,
            names=names,
            fixed=fixed,
            dtype=dtype,
        )
        self.preset = PRESETS[preset]
        self.preset_name = preset
        given = self.preset.clamp if isinstance(clamp, str) else clamp
        self.clamp = None if given is None else (float(given[0]), float(given[1]))
        self.trimmed, self.density = trimmed, density
        own = load_tensors(base, "base")
        others = [load_tensors(one, f"models[{k}]") for k, one in enumerate(models)]
        layers = match_layers(
            model, own, others, only_trainable=self.preset.only_trainable, fixed=fixed
        )
        self.layers, self.fixed = layers.merged, layers.fixed
        self.grouping = group_layers(self.layers, granularity)
        self.names = model_names(models, names)
        # Neither the architecture, the heads nor the checkpoints are parameters of this module.
        parameters = dict(model.named_parameters())
        kinds = {name: dtype or parameters[name].dtype for name in self.layers}
        own_kinds = {n: t.dtype for n, t in (*parameters.items(), *model.named_buffers())}
        self._plain: dict[str, Any] = {
            "architecture": model,
            "heads": None if heads is None else list(heads),
            "paths": (base, list(models)),
            "base": {name: own[name].detach() for name in (*self.layers, *self.fixed)},
            "fixed": {name: own[name].detach().to(own_kinds[name]) for name in self.fixed},
            "buffers": frozenset(name for name, _ in model.named_buffers()),
            "models": [{name: one[name].detach() for name in self.layers} for one in others],
            "packed": None,
            "kinds": kinds,
            "tensor_names": tuple(own),
        }
        for head in heads or ():
            if isinstance(head, nn.Module):
                head.requires_grad_(False)
        if trimmed:
            merged = {name: own[name] for name in self.layers}
            self._plain["packed"] = pack_trimmed(merged, self._plain["models"], density=density)
            self._plain["models"] = [{} for _ in models]
        wide = any(tensor.dtype == torch.float64 for tensor in own.values())
        shape = (len(self.names), len(self.grouping.names))
        table = initial_coefficients(init, shape, torch.float64 if wide else torch.float32)
        self._plain["init"] = table.clone()
        self.raw_coefficients = nn.Parameter(table)
        self.register_buffer(
            "_index", torch.tensor(self.grouping.index, dtype=torch.int64), persistent=False
        )

    @property
    def architecture(self) -> nn.Module:
        """The wrapped module."""
        return self._plain["architecture"]

    @property
    def inputs(self) -> tuple[Any, list[Any]]:
        """The base and the models, as they were passed."""
        return self._plain["paths"]

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of all tensors of the base, merged or not."""
        return self._plain["tensor_names"]

    @property
    def heads(self) -> list[Callable[..., Any]] | None:
        return self._plain["heads"]

    @property
    def init(self) -> Tensor:
        """The initial coefficients, [models, groups], on the CPU."""
        return self._plain["init"]

    def used_coefficients(self) -> Tensor:
        """Return the effective lambda, [models, merged tensors], on the CPU, differentiable."""
        table = self.raw_coefficients
        if self.clamp is not None:
            table = table.clamp(*self.clamp)
        # Kernels take plain numbers, so there is one transfer for all layers.
        return table.cpu().index_select(1, self._index.cpu())

    def merged_parameters(self) -> dict[str, Tensor]:
        """Return the merged tensors by name, differentiable in the coefficients."""
        return dict(self._merged())

    def _merged(self) -> Iterable[tuple[str, Tensor]]:
        columns = self.used_coefficients().unbind(1)
        for name, column in zip(self.layers, columns, strict=True):
            yield name, self._layer(name, column)

    def _layer(self, name: str, column: Tensor) -> Tensor:
        packed, dtype = self._plain["packed"], self._plain["kinds"][name]
        base = self._plain["base"][name]
        if packed is None:
            models = [model[name] for model in self._plain["models"]]
            return merged_layer(column, base, models, dtype=dtype)
        return merged_packed_layer(column, base, packed[name], dtype=dtype)

    def merged_tensor(self, name: str) -> Tensor:
        """Return one merged tensor, differentiable in the coefficients."""
        if name not in self.layers:
            raise RequestError(
                f"name: there is no merged tensor {name!r}{nearest(name, self.layers)}"
            )
        return self._layer(name, self.used_coefficients()[:, self.layers.index(name)])

    def merged_kinds(self) -> Iterable[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Return the name, dtype and shape of each merged tensor."""
        for name in self.layers:
            yield name, self._plain["kinds"][name], tuple(self._plain["base"][name].shape)

    def fixed_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not merged: the base's buffers and frozen parameters.

        They have the architecture's dtypes.
        """
        return dict(self._plain["fixed"])

    def forward(self, *args: Any, task: int | None = None, **kwargs: Any) -> Any:
        """Run the merged model.

        Args:
            args, kwargs: the arguments of the architecture.
            task: 0 .. models - 1, the task whose head computes the logits. Required if there are
                heads; otherwise it has no effect.

        Returns:
            The output of the architecture, or of the task's head applied to it.
        """
        self._check_task(task)
        return self.run(self.merged_parameters(), args, kwargs, task)

    def run(
        self, merged: Mapping[str, Tensor], args: Any, kwargs: Any, task: int | None = None
    ) -> Any:
        """Run the architecture with given merged tensors, then a task's head."""
        return self.apply_head(self.run_architecture(merged, args, kwargs), task)

    def run_architecture(self, merged: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        """Run the architecture with given merged tensors."""
        # A pass that writes to buffers (BatchNorm in training mode) gets copies: the base's buffers
        # belong to the caller, or are mapped files that cannot be written.
        buffers = self._plain["buffers"]
        fixed = {n: t.clone() if n in buffers else t for n, t in self.fixed_tensors().items()}
        tensors = {**fixed, **merged}
        return functional_call(self.architecture, tensors, args, kwargs)

    def apply_head(self, output: Any, task: int | None) -> Any:
        """Return the output of a task's head; without heads, the architecture's output."""
        heads = self._plain["heads"]
        if heads is None:
            return output
        head = heads[task]
        if isinstance(head, nn.Linear) and isinstance(output, Tensor):
            width = output.shape[-1] if output.dim() > 0 else 0
            if width != head.in_features:
                raise RequestError(
                    f"heads[{task}]: expected a head of {width} features, which the architecture "
                    f"gives; got one of {head.in_features}"
                )
        return head(output)

    def _check_task(self, task: int | None) -> None:
        heads = self._plain["heads"]
        if task is None and heads is None:
            return
        if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < len(self.names):
            what = "one of the models" if heads is None else "one of the heads"
            raise RequestError(f"task: expected 0 .. {len(self.names) - 1}, {what}; got {task!r}")

    # Functions from other files; their first argument, `ada`, is this module.
    fit = _fit
    correlations = _correlations
    save_coefficients = _save_coefficients
    save = _save

    @property
    def coefficients(self) -> Coefficients:
        """The effective coefficients: a table that can be printed, saved and drawn."""
        table = self.raw_coefficients.detach().cpu()
        if self.clamp is not None:
            table = table.clamp(*self.clamp)
        names = self.grouping.names
        of = {layer: names[at] for layer, at in zip(self.layers, self.grouping.index, strict=True)}
        return Coefficients(table.float(), self.names, names, of)

    @torch.no_grad()
    def merged_state_dict(self) -> dict[str, Tensor]:
        """Return the merged model, with the base's buffers and frozen parameters."""
        merged = dict(self._merged())
        known = {**self.fixed_tensors(), **merged}
        state: dict[str, Tensor] = {}
        for name, tensor in self.architecture.state_dict(keep_vars=True).items():
            if name in known:
                state[name] = known[name].detach().clone() if name in self.fixed else known[name]
            else:  # another name of a tied parameter
                twin = next(
                    (n for n, p in self.architecture.named_parameters() if p is tensor), None
                )
                state[name] = known[twin] if twin in known else tensor.detach()
        return state

    def stored_tensors(self) -> Iterable[tuple[str, str, Tensor]]:
        """Yield the stored tensors of the checkpoints: "base" or "models[k]", a name, a tensor.

        For trimmed task vectors, the tensor holds the values that are kept.
        """
        plain = self._plain
        for name, tensor in plain["base"].items():
            yield "base", name, tensor
        for k, model in enumerate(plain["models"]):
            for name, tensor in model.items():
                yield f"models[{k}]", name, tensor
        for name, own in (plain["packed"] or {}).items():
            for k, one in enumerate(own):
                yield f"models[{k}]", name, one.values

    def find_nonfinite(self) -> str | None:
        """Return the name of a tensor of a checkpoint that holds NaN or infinity, or None."""
        for label, name, tensor in self.stored_tensors():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return f"{label}[{name!r}]"
        return None

    def nbytes(self) -> int:
        """Return the bytes of the stored checkpoints, including mapped files."""
        total = sum(tensor.nbytes for tensor in self._plain["base"].values())
        packed = self._plain["packed"]
        if packed is not None:
            return total + sum(one.nbytes for own in packed.values() for one in own)
        return total + sum(t.nbytes for model in self._plain["models"] for t in model.values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaMerging:
        """Move the checkpoints, the architecture and the heads along; their dtypes do not
        change."""
        super()._apply(fn, recurse)
        device = self.raw_coefficients.device

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device)

        plain = self._plain
        for key in ("base", "fixed"):
            plain[key] = {name: moved(tensor) for name, tensor in plain[key].items()}
        plain["models"] = [{n: moved(t) for n, t in model.items()} for model in plain["models"]]
        if plain["packed"] is not None:
            plain["packed"] = {
                name: [one.to(device) for one in own] for name, own in plain["packed"].items()
            }
        if not any(p.is_meta for p in plain["architecture"].parameters()):
            plain["architecture"].to(device)
        for head in plain["heads"] or ():
            if isinstance(head, nn.Module):
                head.to(device)
        return self

    def train(self, mode: bool = True) -> AdaMerging:
        """Set the mode of this module and of the architecture (dropout, batch statistics)."""
        super().train(mode)
        if hasattr(self, "_plain"):
            self._plain["architecture"].train(mode)
        return self

    def extra_repr(self) -> str:
        kind = "trimmed, " if self.trimmed else ""
        return (
            f"{len(self.names)} models, {len(self.layers)} tensors, "
            f"{len(self.grouping.names)} groups, {kind}preset={self.preset_name!r}"
        )
