"""Merges tensors, lists of tensors and state dicts in memory, by a method's name or record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from pymerge.dtypes import is_float
from pymerge.engine.context import Context
from pymerge.engine.execute import execute
from pymerge.engine.work import Work
from pymerge.errors import RequestError, nearest
from pymerge.memory import most_bins
from pymerge.merging.statistics import match_statistics
from pymerge.merging.structures import (
    Tensors,
    check_tensors,
    named_tensors,
    shown_name,
    structured,
    tied_names,
)
from pymerge.merging.tensors import MemorySink, MemorySource
from pymerge.methods import REQUIRED, MethodSpec, Parameter, get
from pymerge.ops import contract as contract  # declares torch.ops.pymerge
from pymerge.ops.backends import resolve_for
from pymerge.ops.runner import Runner

__all__ = ["T", "merge", "merge_by", "resolve_parameters"]

T = TypeVar("T", bound=Tensors)


def merge(
    method: str,
    base: T | None,
    models: Sequence[T],
    *,
    weights: float | Sequence[float] | None = None,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    statistics: Sequence[Any] | None = None,
    base_statistics: Any = None,
    **parameters: Any,
) -> T:
    """Merge models by a method's name.

    Args:
        method: a name of `methods()`.
        base: the pre-trained model: a tensor, a list of tensors, or a state dict. `linear`
            does without (None), and leaves it out of the average if it is given.
        models: the fine-tuned models, each of the structure, keys and shapes of `base`.
        weights: one for each model, or one for all; default 1.
        backend: "reference", "cpu", "cuda", "triton", or None for the fastest that can run.
        dtype: of the result; default the dtypes of `base` (`linear`: of `models[0]`).
        statistics, base_statistics: what was collected of each model, and of the base, for the
            methods that need it: see `fisher_merge`, `regmean_merge`, `gradient_matching`.
        parameters: the method's own, e.g. `density`, `scale`; those of scope "model" may be one
            number or one for each model.

    Returns:
        The merged model, in the structure of `base`. Integer and boolean tensors must be equal in
        all models and are copied. Tensors that share memory in `base` share it in the result, if
        they are equal in all models.

    Raises:
        RequestError (a ValueError): unknown names, values out of range, structures, shapes or
            dtypes that do not fit, weights that sum to zero where they are divided by, NaN or
            infinity in an input.

    >>> base = torch.zeros(4)
    >>> merge("task_arithmetic", base, [base + 1, base + 2], weights=[1, 0.5])
    tensor([2., 2., 2., 2.])
    """
    spec = get(method, "merge: method")
    collected = (statistics, base_statistics)
    return merge_by(
        spec, "merge", base, models, weights, backend, dtype, parameters, collected=collected
    )


def merge_by(
    spec: MethodSpec,
    where: str,
    base: Any,
    models: Any,
    weights: Any,
    backend: str | None,
    dtype: torch.dtype | None,
    parameters: Mapping[str, Any],
    *,
    collected: tuple[Any, Any] = (None, None),
    names: tuple[str, str] = ("statistics", "base_statistics"),
) -> Any:
    """Return the merged model; see `merge`.

    Args:
        where: what messages begin with.
        collected: the statistics of the models and of the base.
        names: what the caller calls them.
    """
    models = _check_models(spec, where, base, models)
    first = models[0] if base is None else base
    inputs = {} if base is None else {"base": named_tensors(base, f"{where}: base", first)}
    inputs |= {
        f"models[{k}]": named_tensors(model, f"{where}: models[{k}]", first)
        for k, model in enumerate(models)
    }
    check_tensors(where, inputs, first)
    statistics = match_statistics(spec, where, inputs, first, collected, names)
    if dtype is not None and not is_float(dtype):
        raise RequestError(
            f"{where}: dtype: expected float32, float16, bfloat16 or float64; got {dtype}"
        )
    has_base = spec.with_base(base is not None)
    if not has_base:
        inputs.pop("base", None)
    resolved = resolve_parameters(spec, where, len(models), weights, parameters)

    leader = next(iter(inputs.values()))
    tied = tied_names(inputs)
    works, results = [], {}
    for name, tensor in leader.items():
        if name in tied:
            continue
        floating = tensor.is_floating_point()
        wide = dtype == torch.float64 or any(
            t[name].dtype == torch.float64 for t in inputs.values()
        )
        shape = tuple(tensor.shape)
        own = resolved
        if spec.for_tensor is not None and floating:
            own = spec.for_tensor(resolved, name)
        works.append(Work(name, tensor.numel(), floating and wide, not floating, own, shape))
        kind = dtype if dtype is not None and floating else tensor.dtype
        results[name] = torch.empty(tensor.shape, dtype=kind, device=tensor.device)
    device = next((t.device for t in leader.values()), torch.device("cpu"))
    # A backend named explicitly must have what the method needs; else each op's fastest runs.
    dialect = spec.in_dialect(resolved.get("semantics"))
    chosen = resolve_for(dialect.name, dialect.backends, backend, device).NAME
    runner = Runner("auto" if backend in (None, "auto") else chosen, str(device))
    source = MemorySource(
        [f"{where}: {label}" for label in inputs],
        inputs["base"] if has_base else None,
        [tensors for label, tensors in inputs.items() if label != "base"],
        {name: shown_name(name, first) for name in leader},
        statistics,
    )
    bins = most_bins(len(inputs))
    context = Context(backend=runner, bins=bins, nan=resolved["nan"], gathers=True)
    if device.type != "meta":  # of meta tensors there is nothing but the shapes and dtypes
        execute(spec, works, source, MemorySink(results), context)
    for name, kept in tied.items():
        results[name] = results[kept]
    return structured(first, {name: results[name] for name in leader})


def resolve_parameters(
    spec: MethodSpec, where: str, count: int, weights: Any, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Check a method's parameters and fill in defaults; those of scope "model" become lists.

    Raises RequestError listing everything that is wrong.
    """
    # Files are a config's; functions take what is in them.
    known = {p.name: p for p in spec.parameters if p.kind != "path"}
    spelled = ["weights" if name == "weight" else name for name in known]
    problems = [
        f"{where}: unknown parameter {name!r} of method {spec.name}{nearest(name, spelled)} "
        f"(known: {', '.join(sorted(spelled))})"
        for name in given
        if name not in known or name == "weight"
    ]
    problems += [
        f"{where}: {name} has no effect in method {spec.name}; leave it out"
        for name in given
        if name in known and (known[name].no_effect or known[name].only is not None)
    ]
    if weights is not None and "weight" not in known:
        problems.append(
            f"{where}: weights: {spec.name} takes none, got {weights!r}; leave them out"
        )
    values: dict[str, Any] = {}
    for name, parameter in known.items():
        shown = f"{where}: {'weights' if name == 'weight' else name}"
        value = weights if name == "weight" else given.get(name)
        if value is None and name == "nan" and name in given:
            problems.append(f"{shown}: expected {parameter.expected}, got None")
            continue
        try:
            values[name] = _resolve(parameter, shown, value, count)
        except RequestError as error:
            problems.extend(error.problems)
    if not problems and spec.check is not None:
        problems += [f"{where}: {problem}" for problem in spec.check(values)]
    if not problems and spec.cancelling(values) is not None:
        problems.append(
            f"{where}: weights {values['weight']} sum to {sum(values['weight']):g}, and "
            f"{spec.divides}=True divides by their sum; give other weights or {spec.divides}=False"
        )
    if problems:
        raise RequestError(problems)
    return values


def _resolve(parameter: Parameter, where: str, value: Any, count: int) -> Any:
    per_model = parameter.scope == "model"
    if value is None:
        if parameter.default is REQUIRED:
            raise RequestError(f"{where}: is required: {parameter.expected}")
        default = parameter.default
        return [default] * count if per_model else default
    if not per_model:
        return parameter.check(value, where)
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if not isinstance(value, (list, tuple)) and not hasattr(value, "__len__"):
        return [parameter.check(value, where)] * count
    if isinstance(value, (str, Mapping)):
        raise RequestError(f"{where}: expected one number or {count} of them, got {value!r}")
    if len(value) != count:
        raise RequestError(
            f"{where}: expected one number or {count}, one for each model; got {len(value)}"
        )
    return [parameter.check(item, f"{where}[{k}]") for k, item in enumerate(value)]


def _check_models(spec: MethodSpec, where: str, base: Any, models: Any) -> list[Any]:
    if isinstance(models, (torch.Tensor, Mapping)) or not isinstance(models, Sequence):
        raise RequestError(
            f"{where}: models: expected a list of models, got {type(models).__name__}"
        )
    if len(models) < spec.min_models:
        raise RequestError(
            f"{where}: models: {spec.name} needs at least {spec.min_models} "
            f"model{'s' if spec.min_models > 1 else ''}, got {len(models)}"
        )
    if spec.max_models is not None and len(models) > spec.max_models:
        raise RequestError(
            f"{where}: models: {spec.name} takes at most {spec.max_models} "
            f"model{'s' if spec.max_models > 1 else ''}, got {len(models)}"
        )
    if spec.needs_base and base is None:
        raise RequestError(f"{where}: base: {spec.name} needs a base model, got None")
    return list(models)
