"""The Python API over tensors, lists of tensors and state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch

from pymerge import _ops as _ops  # declares torch.ops.pymerge
from pymerge.backends import resolve_for
from pymerge.data_driven.inputs import match_statistics
from pymerge.engine.execute import Context, execute
from pymerge.engine.memory import MemorySink, MemorySource
from pymerge.engine.work import Work
from pymerge.errors import RequestError, nearest
from pymerge.memory import most_bins
from pymerge.methods import METHODS, REQUIRED, MethodSpec, Parameter, get
from pymerge.methods.ties import TiesRule
from pymerge.runner import Runner

__all__ = ["Tensors", "linear", "merge", "task_arithmetic", "ties_merge"]

Tensors = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]
T = TypeVar("T", bound=Tensors)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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


def linear(
    models: Sequence[T],
    *,
    weights: float | Sequence[float] | None = None,
    normalize: bool = True,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Average models: sum_k w_k theta_k / sum_k w_k (Wortsman et al. 2022).

    Args:
        models: tensors, lists of tensors or state dicts, all alike; at least one.
        weights: one for each model, or one for all; default 1.
        normalize: divide by the sum of the weights, which then must not be 0.
        nan: "error" or "keep".
        backend, dtype: as in `merge`.

    Raises:
        RequestError: as in `merge`.

    >>> linear([torch.tensor([1.0]), torch.tensor([3.0])])
    tensor([2.])
    """
    parameters = {"normalize": normalize, "nan": nan}
    return merge_by(LINEAR, "linear", None, models, weights, backend, dtype, parameters)


def task_arithmetic(
    base: T,
    models: Sequence[T],
    *,
    weights: float | Sequence[float] | None = None,
    scale: float = 1.0,
    normalize: bool = False,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Add scaled task vectors (Ilharco et al. 2023).

    theta_0 + scale * sum_k w_k (theta_k - theta_0)

    A negative weight forgets a task; weights [1, 1, -1] make the analogy "C and B as A".

    Args:
        base, models: as in `merge`.
        weights: one for each model, or one for all; default 1.
        scale: the scaling coefficient (lambda).
        normalize: divide the sum by the sum of the weights, which then must not be 0.
        nan: "error" or "keep".
        backend, dtype: as in `merge`.

    Raises:
        RequestError: as in `merge`.

    >>> base = torch.zeros(2)
    >>> task_arithmetic(base, [base + 1.0], weights=-1.0, scale=0.5)
    tensor([-0.5000, -0.5000])
    """
    parameters = {"scale": scale, "normalize": normalize, "nan": nan}
    return merge_by(
        TASK_ARITHMETIC, "task_arithmetic", base, models, weights, backend, dtype, parameters
    )


def ties_merge(
    base: T,
    models: Sequence[T],
    *,
    density: float | Sequence[float] = 0.2,
    scale: float = 1.0,
    weights: float | Sequence[float] | None = None,
    semantics: str = "official",
    scope: str | None = None,
    merge: str | None = None,
    exact_k: bool | None = None,
    nan: str = "error",
    backend: str | None = None,
    elect: str | None = None,
    normalize: bool | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Merge by TIES: trim, elect a sign per element, merge what agrees (Yadav et al. 2023).

    Args:
        base, models: as in `merge`.
        density: share of each task vector that is kept, in [0, 1]; one number or one for each
            model.
        scale: the scaling coefficient (lambda).
        weights: one for each model, or one for all; default 1. They scale the trimmed task vectors
            before the election ("mergekit", and as an extension the dialects that know no weights),
            or only what is summed ("peft").
        semantics: whose TIES: "official", "mergekit", "peft", "mergelm", "adamerging" (the same as
            "fusionbench"), "sd_mecha". docs/methods.md lists the differences.
        scope, merge, exact_k, elect: single details that override the semantics: "global" or
            "tensor"; "mean", "sum" or "max"; keep exactly k or all at the threshold; "mass" or
            "count".
        normalize: mergekit's word for merge="mean" (True) or "sum" (False).
        nan: "error" or "keep".
        backend, dtype: as in `merge`.

    Raises:
        RequestError: as in `merge`.

    >>> base = torch.zeros(4)
    >>> ties_merge(base, [torch.tensor([4.0, 1.0, -2.0, 0.5]), torch.tensor([2.0, -3.0, 1.0, 0.5])],
    ...            density=0.25)
    tensor([ 3., -3., -2.,  0.])
    """
    parameters = {
        "density": density,
        "scale": scale,
        "semantics": semantics,
        "scope": scope,
        "merge": merge,
        "exact_k": exact_k,
        "nan": nan,
        "elect": elect,
        "normalize": normalize,
    }
    return merge_by(TIES, "ties_merge", base, models, weights, backend, dtype, parameters)


LINEAR, TASK_ARITHMETIC, TIES = METHODS["linear"], METHODS["task_arithmetic"], METHODS["ties"]


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
    """
    Args:
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
    _check_tensors(where, inputs, first)
    statistics = match_statistics(spec, where, inputs, first, collected, names)
    if dtype is not None and dtype not in _FLOATS:
        raise RequestError(
            f"{where}: dtype: expected float32, float16, bfloat16 or float64; got {dtype}"
        )
    has_base = spec.with_base(base is not None)
    if not has_base:
        inputs.pop("base", None)
    resolved = resolve_parameters(spec, where, len(models), weights, parameters)

    leader = next(iter(inputs.values()))
    tied = _tied_names(inputs)
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
        {name: _shown(name, first) for name in leader},
        statistics,
    )
    bins = most_bins(len(inputs))
    context = Context(backend=runner, bins=bins, nan=resolved["nan"], gathers=True)
    if device.type != "meta":  # of meta tensors there is nothing but the shapes and dtypes
        execute(spec.name, works, source, MemorySink(results), context)
    for name, kept in tied.items():
        results[name] = results[kept]
    return structured(first, {name: results[name] for name in leader})


def match_tensors(
    where: str, base: Any, models: Sequence[Any]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Return base and models as dictionaries of tensors that fit each other, by their labels, and
    what messages call each tensor; raise RequestError listing what does not fit."""
    inputs = {"base": named_tensors(base, f"{where}: base", base)}
    inputs |= {
        f"models[{k}]": named_tensors(model, f"{where}: models[{k}]", base)
        for k, model in enumerate(models)
    }
    _check_tensors(where, inputs, base)
    return inputs, {name: _shown(name, base) for name in inputs["base"]}


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
    if not problems and spec.name == "ties":
        TiesRule.of(values, where)
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


def named_tensors(value: Any, where: str, like: Any) -> dict[str, torch.Tensor]:
    """Return a structure as a dictionary of tensors; lists get names whose order is the list's."""
    kinds = {torch.Tensor: "a tensor", Mapping: "a state dict", Sequence: "a list of tensors"}
    kind = next((k for k in kinds if isinstance(value, k)), None)
    expected = next((k for k in kinds if isinstance(like, k)), None)
    if kind is None or isinstance(value, str):
        raise RequestError(
            f"{where}: expected a tensor, a list of tensors or a state dict, got "
            f"{type(value).__name__}"
        )
    if kind is not expected and expected is not None:
        raise RequestError(f"{where}: expected {kinds[expected]} like the first, got {kinds[kind]}")
    if kind is torch.Tensor:
        items = {"": value}
    elif kind is Mapping:
        items = dict(value)
    else:
        items = {f"{index:012d}": tensor for index, tensor in enumerate(value)}
    for name, tensor in items.items():
        if not isinstance(name, str):
            raise RequestError(f"{where}: keys must be strings, got {name!r}")
        if not isinstance(tensor, torch.Tensor):
            raise RequestError(
                f"{where}{_suffix(name, value)}: expected a tensor, got {type(tensor).__name__}"
            )
    return items


def _suffix(name: str, like: Any) -> str:
    if isinstance(like, torch.Tensor):
        return ""
    return f"[{name!r}]" if isinstance(like, Mapping) else f"[{int(name)}]"


def _shown(name: str, like: Any) -> str:
    return f"tensor{_suffix(name, like)}" if _suffix(name, like) else "the tensor"


def _check_tensors(where: str, inputs: Mapping[str, dict[str, torch.Tensor]], like: Any) -> None:
    labels = list(inputs)
    leader, first = labels[0], inputs[labels[0]]
    problems = []

    def suffix(name: str) -> str:
        return _suffix(name, like)

    for label in labels:
        for name, tensor in inputs[label].items():
            reason = _refusal(tensor)
            if reason is not None:
                problems.append(f"{where}: {label}{suffix(name)}: {reason}")
    for label in labels[1:]:
        tensors = inputs[label]
        for name in first.keys() - tensors.keys():
            problems.append(f"{where}: {label} lacks {suffix(name) or 'the tensor'} of {leader}")
        for name in tensors.keys() - first.keys():
            problems.append(f"{where}: {label}{suffix(name)} is not in {leader}")
        for name in first.keys() & tensors.keys():
            mine, tensor = first[name], tensors[name]
            shown = f"{where}: {label}{suffix(name)}"
            if mine.shape != tensor.shape:
                problems.append(
                    f"{shown} has shape {tuple(tensor.shape)}, expected {tuple(mine.shape)} like "
                    f"{leader}"
                )
            floats = mine.is_floating_point(), tensor.is_floating_point()
            if floats[0] != floats[1] or (not floats[0] and mine.dtype != tensor.dtype):
                problems.append(
                    f"{shown} has dtype {tensor.dtype}, expected {mine.dtype} like {leader}"
                )
            if mine.device != tensor.device:
                problems.append(
                    f"{shown} is on {tensor.device}, expected {mine.device} like {leader}"
                )
    if problems:
        raise RequestError(sorted(problems))


def _refusal(tensor: torch.Tensor) -> str | None:
    """Say why a tensor cannot be merged, or return None."""
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout} cannot be merged; make it dense"
    unknown = tensor.is_floating_point() and tensor.dtype not in _FLOATS
    if unknown or tensor.is_complex() or tensor.is_quantized:
        return f"dtype {tensor.dtype} cannot be merged; convert it"
    return None


def _tied_names(inputs: Mapping[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """Return {name: the earlier name it shares its memory with in the first input and equals in
    all}."""
    seen: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    first, *others = inputs.values()
    for name, tensor in first.items():
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        earlier = seen.setdefault(memory, name)
        if earlier == name:
            continue
        if all(
            other[name].data_ptr() == other[earlier].data_ptr()
            or torch.equal(other[name], other[earlier])
            for other in others
        ):
            tied[name] = earlier
    return tied


def structured(like: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(like, torch.Tensor):
        return tensors[""]
    if isinstance(like, Mapping):
        if type(like) is dict:
            return tensors
        try:
            return cast(Any, type(like))(tensors)
        except TypeError:
            return tensors
    values = [tensors[name] for name in sorted(tensors)]
    return tuple(values) if isinstance(like, tuple) else values
