"""`pymerge.analyze`: opens the models, reads them, builds the records."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.analysis.groups import Grouper, magnitude_of
from pymerge.analysis.names import OTHER, layer_order, places
from pymerge.analysis.passes import Measured, Passes
from pymerge.analysis.records import Analysis, Facts, Group, Model, Spectrum, Tensor
from pymerge.dtypes import FLOATS
from pymerge.engine.work import Source, Work
from pymerge.errors import NonFiniteError, RequestError
from pymerge.memory import PeakMemory, default_threads
from pymerge.merging.progress import Recorder
from pymerge.merging.report import package_version
from pymerge.ops.backends import BACKENDS, resolve
from pymerge.ops.comparison import MOST_MODELS
from pymerge.ops.runner import Runner
from pymerge.ops.threads import kernel_threads

__all__ = ["DENSITIES", "analyze"]

DENSITIES = (0.1, 0.2, 0.5)
_SHOWN = 5


def analyze(
    base: Any,
    models: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    densities: Sequence[float] = DENSITIES,
    thresholds: str = "sampled",
    spectra: bool = False,
    rank: int = 16,
    nan: str = "error",
    backend: str | None = None,
    threads: int | None = None,
    quiet: bool = True,
) -> Analysis:
    """Compare the task vectors tau_k = theta_k - theta_0 of models, before merging them.

    Computes norms, dot products, cosines, distances, unchanged and equal weights, sign conflicts,
    and what TIES' trim keeps and how far that overlaps, for the whole model, each layer, each type
    of module and each tensor. Checkpoints are streamed, all of them once (`thresholds="exact"`: two
    or three times; `spectra`: once more, matrix by matrix).

    Args:
        base: the pre-trained model: path of a checkpoint, or a state dict, list of tensors or
            tensor.
        models: 1 to 64 fine-tuned models, each like `base`: all paths, or all in memory.
        names: names of the models in reports, all different; default the names of their files, or
            "model 1" and so on.
        densities: shares of a task vector, in (0, 1], at which TIES' trim over the whole model is
            analysed; () for none.
        thresholds: of these trims. "sampled": order statistics of 131072 magnitudes, spread over
            the model: a density of 0.2 then keeps 0.2 +- 0.004, and `Trimmed.kept` has the exact
            share. "exact": those of TIES (official), by one or two more passes over the files.
            Models of up to 2^24 parameters always have exact ones.
        spectra: also compare singular values and subspaces of matrices, which takes long.
        rank: singular vectors of each model in a subspace, at least 1.
        nan: "error", or "skip": leave out tensors with NaN or infinity, and mention it in the
            notes.
        backend: "cpu", "reference", or None for the fastest.
        threads: of the CPU kernels; default one for each core that the process may run on.
        quiet: show no progress on stderr.

    Returns:
        Records of plain numbers: see `pymerge.analysis`. Tensors of integers and booleans are left
        out. Everything except the facts (and `spectra`) is the same for any backend, number of
        threads and shard layout.

    Raises:
        RequestError: the request is invalid, or the models do not fit the base; lists every
            problem.
        NonFiniteError: NaN or infinity in an input, unless they are skipped.

    >>> import torch
    >>> base = {"w": torch.zeros(2)}
    >>> found = analyze(base, [{"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([4.0, -3.0])}])
    >>> found.whole.l2, found.whole.cosine[0][1], found.whole.sign_conflict[0][1]
    ((5.0, 5.0), 0.0, 0.5)
    """
    started = time.monotonic()
    _check(models, names, densities, thresholds, rank, nan, threads)
    densities = tuple(sorted({float(density) for density in densities}))
    if backend not in (None, "auto", "cpu", "reference"):
        raise RequestError(
            f"analyze: backend: expected cpu, reference or auto, got {backend!r}: GPUs have no "
            "kernels for an analysis"
        )
    with ExitStack() as stack:
        peak = stack.enter_context(PeakMemory())
        recorder = stack.enter_context(Recorder(quiet=quiet))
        recorder.phase("open", 0)
        opened = _open(base, list(models), names, stack)
        chosen = "auto" if backend in (None, "auto") else str(backend)
        runner = Runner(resolve(chosen, "cpu").NAME)
        count = default_threads() if threads is None else threads
        stack.enter_context(kernel_threads(count))

        notes = list(opened.notes)
        works = opened.works
        while True:
            passes = Passes(works, opened.source, runner, recorder)
            how = passes.select(densities, len(models), thresholds == "exact")
            measured = passes.measure()
            if not passes.bad:
                break
            if nan == "error":
                raise NonFiniteError(_bad(passes.bad, opened.source))
            notes.append("left out: " + _bad(passes.bad, opened.source))
            works = [work for work in works if work.name not in passes.bad]
            if not works:
                raise NonFiniteError("analyze: every tensor holds NaN or infinity")
        found: tuple[Spectrum, ...] = ()
        if spectra:
            from pymerge.analysis.spectra import all_spectra

            found = all_spectra(works, opened.source, rank, recorder)
        recorder.phase("records", 0)
        values = [[magnitude_of(key, passes.wide) for key in level] for level in passes.thresholds]
        grouper = Grouper(len(models), densities, values)
        inventory = _inventory(works, opened)
        groups = _groups(grouper, inventory, measured)
        notes += _remarks(groups["whole"][0], [model.label for model in opened.models])
        isa = BACKENDS["cpu"].build().get("isa") if runner.backend == "cpu" else None
        facts = Facts(
            version=package_version(),
            seconds=time.monotonic() - started,
            bytes_read=passes.bytes_read,
            passes=passes.passes,
            backend=runner.backend,
            isa=isa,
            device="cpu",
            threads=count,
            peak_anonymous=peak.anonymous,
            thresholds=how,
        )
        return Analysis(
            base=opened.base,
            models=tuple(opened.models),
            densities=densities,
            inventory=inventory,
            whole=groups["whole"][0],
            layers=tuple(groups["layers"]),
            module_types=tuple(groups["module_types"]),
            tensors=tuple(groups["tensors"]),
            spectra=found,
            notes=tuple(notes),
            facts=facts,
        )


def _check(
    models: Any,
    names: Any,
    densities: Any,
    thresholds: Any,
    rank: Any,
    nan: Any,
    threads: Any,
) -> None:
    """Raise RequestError with every problem of the arguments themselves."""
    problems = []
    if isinstance(models, (str, os.PathLike, Mapping)) or not isinstance(models, Sequence):
        problems.append(f"models: expected a list of models, got {type(models).__name__}")
    elif not 1 <= len(models) <= MOST_MODELS:
        problems.append(f"models: expected 1 to {MOST_MODELS} models, got {len(models)}")
    elif names is not None:
        unique = len({str(name) for name in names})
        if isinstance(names, str) or len(names) != len(models) or unique != len(models):
            problems.append(
                f"names: expected {len(models)} different names, one for each model, got {names!r}"
            )
    for density in densities:
        number = isinstance(density, (int, float)) and not isinstance(density, bool)
        if not number or not 0.0 < density <= 1.0:
            problems.append(f"densities: expected numbers in (0, 1], got {density!r}")
    if thresholds not in ("sampled", "exact"):
        problems.append(f"thresholds: expected 'sampled' or 'exact', got {thresholds!r}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        problems.append(f"rank: expected an integer of 1 or more, got {rank!r}")
    if nan not in ("error", "skip"):
        problems.append(f"nan: expected 'error' or 'skip', got {nan!r}")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        problems.append(f"threads: expected an integer of 1 or more, got {threads!r}")
    if problems:
        raise RequestError([f"analyze: {problem}" for problem in problems])


@dataclass(frozen=True)
class _Opened:
    """Models that are ready to be read; dtypes: of base and models, by tensor."""

    source: Source
    works: list[Work]
    base: Model
    models: list[Model]
    dtypes: dict[str, tuple[str, ...]]
    notes: list[str]


def _open(base: Any, models: list[Any], names: Sequence[str] | None, stack: ExitStack) -> _Opened:
    on_disk = [isinstance(model, (str, os.PathLike)) for model in (base, *models)]
    if all(on_disk):
        return _open_files(base, models, names, stack)
    if any(on_disk):
        raise RequestError(
            "analyze: expected paths only, or models in memory only, got some of both"
        )
    return _open_memory(base, models, names)


def _open_files(
    base: Any, models: list[Any], names: Sequence[str] | None, stack: ExitStack
) -> _Opened:
    from pymerge.config import ModelEntry
    from pymerge.config.schema import read_reference
    from pymerge.merging.files import CheckpointSource
    from pymerge.plan.inputs import header, open_inputs

    problems: list[str] = []

    def entry(path: Any, label: str) -> ModelEntry | None:
        where = f"analyze: {label}"
        found = read_reference(os.fspath(path), (), lambda _: where, problems)
        return found and ModelEntry(found.path, {}, where, label, found.adapter)

    given = entry(base, "base_model")
    entries = [entry(model, f"models[{k}]") for k, model in enumerate(models)]
    if problems:
        raise RequestError(problems)
    inputs = open_inputs([one for one in entries if one is not None], given)
    stack.callback(inputs.close)
    if inputs.problems:
        raise RequestError(inputs.problems)
    assert inputs.base is not None
    works, dtypes, left_out = [], {}, []
    for name, info in inputs.base.tensors.items():
        kinds = tuple(header(checkpoint, name).dtype for checkpoint in inputs.all)
        if info.dtype not in FLOATS:
            left_out.append(name)
            continue
        works.append(Work(name, info.numel, "F64" in kinds, False, {}, info.shape))
        dtypes[name] = kinds
    source = CheckpointSource(inputs.base, inputs.models)
    stack.callback(source.close)
    paths = [Path(model) for model in models]
    labels = _labels(names, [path.stem if path.is_file() else path.name for path in paths])
    return _Opened(
        source,
        _some(works),
        Model(Path(base).name, os.fspath(base)),
        [Model(label, str(path)) for label, path in zip(labels, paths, strict=True)],
        dtypes,
        [*inputs.warnings, *_left_out(left_out)],
    )


def _open_memory(base: Any, models: list[Any], names: Sequence[str] | None) -> _Opened:
    from pymerge.dtypes import dtype_code
    from pymerge.merging.structures import match_tensors
    from pymerge.merging.tensors import MemorySource

    inputs, shown = match_tensors("analyze", base, models)
    works, dtypes, left_out = [], {}, []
    for name, tensor in inputs["base"].items():
        if not tensor.is_floating_point():
            left_out.append(name)
            continue
        kinds = tuple(dtype_code(tensors[name].dtype) for tensors in inputs.values())
        works.append(Work(name, tensor.numel(), "F64" in kinds, False, {}, tuple(tensor.shape)))
        dtypes[name] = kinds
    # Tensors on a GPU are copied to the host, one at a time: GPUs have no kernels for this.
    host = [{name: t.cpu() for name, t in tensors.items()} for tensors in inputs.values()]
    labels = _labels(names, [f"model {k + 1}" for k in range(len(models))])
    return _Opened(
        MemorySource([f"analyze: {label}" for label in inputs], host[0], host[1:], shown),
        _some(works),
        Model("base", ""),
        [Model(label, "") for label in labels],
        dtypes,
        _left_out(left_out),
    )


def _some(works: list[Work]) -> list[Work]:
    if not works:
        raise RequestError("analyze: base: holds no tensors of floats")
    return works


def _labels(names: Sequence[str] | None, found: list[str]) -> list[str]:
    """Return unique labels: those given, else those found, numbered if they are the same."""
    if names is not None:
        return [str(name) for name in names]
    return [
        f"{label} ({k + 1})" if found.count(label) > 1 or not label else label
        for k, label in enumerate(found)
    ]


def _left_out(names: list[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"left out, since they hold integers or booleans: {shown}{more}"]


def _bad(bad: Mapping[str, Sequence[int]], source: Source) -> str:
    texts = [
        f"{source.labels[k]}: {source.describe(name)} holds NaN or infinity, {count} of them"
        for name, counts in bad.items()
        for k, count in enumerate(counts)
        if count
    ]
    more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more + "; nan='skip' leaves such tensors out"


def _inventory(works: Sequence[Work], opened: _Opened) -> tuple[Tensor, ...]:
    where = places([work.name for work in works])
    return tuple(
        Tensor(
            work.name,
            tuple(work.shape),
            where[work.name].layer,
            where[work.name].module_type,
            opened.dtypes[work.name],
        )
        for work in works
    )


def _groups(
    grouper: Grouper, inventory: Sequence[Tensor], measured: Mapping[str, Measured]
) -> dict[str, list[Group]]:
    whole = Measured.together(list(measured.values()))
    layers: dict[str, list[Measured]] = {}
    types: dict[str, list[Measured]] = {}
    for tensor in inventory:
        own = measured[tensor.name]
        layers.setdefault(OTHER if tensor.layer is None else tensor.layer, []).append(own)
        types.setdefault(tensor.module_type, []).append(own)
    return {
        "whole": [grouper.group("whole model", whole, whole)],
        "layers": [
            grouper.group(name, Measured.together(layers[name]), whole)
            for name in sorted(layers, key=layer_order)
        ],
        "module_types": [
            grouper.group(name, Measured.together(own), whole) for name, own in types.items()
        ],
        "tensors": [grouper.group(t.name, measured[t.name], whole) for t in inventory],
    }


def _remarks(whole: Group, labels: Sequence[str]) -> list[str]:
    """Return what a reader should know about the models as a whole."""
    notes = [
        f"{label} equals the base: its task vector is zero, and has no angles"
        for label, unchanged in zip(labels, whole.unchanged, strict=True)
        if unchanged == 1.0
    ]
    notes += [
        f"{labels[i]} and {labels[j]} are equal"
        for i in range(len(labels))
        for j in range(i + 1, len(labels))
        if whole.equal[i][j] == 1.0
    ]
    return notes
