"""Extracts a LoRA from a fine-tuned model: low-rank factors of each weight's change, streamed."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pymerge.adapters.combine import check_rank
from pymerge.adapters.decompose import LowRank, Method, factor_matrix
from pymerge.adapters.extract_report import Extracted, ExtractReport
from pymerge.adapters.targets import Chooser, Targets, shortest, task_type
from pymerge.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from pymerge.checkpoint.peft.adapter import Kind, Module
from pymerge.checkpoint.peft.build import Factors, lora
from pymerge.checkpoint.peft.files import CODES, write
from pymerge.dtypes import DTYPES, FLOATS
from pymerge.engine.work import slices
from pymerge.errors import NonFiniteError, RequestError, nearest
from pymerge.merging.progress import Recorder
from pymerge.merging.publish import Publication
from pymerge.ops.array import Array, widen
from pymerge.ops.native.low_rank import store
from pymerge.ops.threads import torch_threads

__all__ = ["EXTRACT_REPORT", "ExtractReport", "Extracted", "extract_lora"]

EXTRACT_REPORT = "pymerge_extract.json"
_SHOWN = 20
_AT_ONCE = 1 << 22  # elements that are subtracted at once


def extract_lora(
    base: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    modules: Targets = None,
    exclude: Targets = None,
    save_changed: bool = False,
    method: Method = "auto",
    dtype: str = "float32",
    fan_in_fan_out: bool | None = None,
    prefix: str = "",
    seed: int = 0,
    force: bool = False,
    quiet: bool = True,
) -> ExtractReport:
    """Write a LoRA whose deltas approximate a fine-tune's change, and report how closely.

    For each chosen matrix, the difference of the models is taken in float32 (which holds their
    dtypes exactly) and factored: B A = U_r S_r V_r^T, the best of its rank (Eckart and Young 1936),
    each factor with the root of S. Large matrices are projected on random columns (Halko,
    Martinsson and Tropp 2011), with a generator seeded for each. This runs on one thread, so that
    results depend only on `seed`. Memory holds one matrix.

    Args:
        base, model: checkpoints of one architecture.
        out: directory to write, in PEFT's format, with a report; must not exist unless `force`.
        rank: of every module (smaller if a matrix has a smaller one); default 16.
        energy: instead of a rank, in (0, 1]: each module gets the least rank that keeps this share
            of the squared norm of its change.
        max_rank: the largest rank allowed with `energy`.
        modules: as target_modules in PEFT: last parts of module names, or a regular expression that
            matches the whole name. Default: every matrix except embeddings and heads.
        exclude: modules to leave out, in the same form.
        save_changed: store other changed tensors whole in the adapter (modules_to_save, trained
            biases); otherwise they are reported.
        method: "exact", "randomized", or "auto": exact for small matrices and large ranks.
        dtype: of the factors: "float32", "bfloat16" or "float16".
        fan_in_fan_out: whether weights are [in, out] (Conv1D); None: decided by the model's config.
        prefix: prepended to the module names, if the class that the adapter is for has the
            checkpoint's tensors under a prefix, e.g. "transformer.".
        seed: of random columns, >= 0.
        force: replace an existing `out`.
        quiet: show no progress on stderr.

    Raises:
        RequestError: checkpoints that do not fit each other, no changes, wrong options.
        NonFiniteError: a weight holds NaN or infinity.
        MergeError: the output could not be written.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> from pymerge.adapters import load
    >>> base, change = torch.zeros(3, 2), torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"fc.weight": base}, f"{folder}/base.safetensors")
    ...     save_file({"fc.weight": base + change}, f"{folder}/model.safetensors")
    ...     paths = [f"{folder}/{name}.safetensors" for name in ("base", "model")]
    ...     report = extract_lora(*paths, f"{folder}/out", rank=1)
    ...     load(f"{folder}/out").delta("fc").round(4)
    array([[1., 2.],
           [2., 4.],
           [0., 0.]], dtype=float32)
    """
    if rank is None and energy is None:
        rank = 16
    with Publication(out, [base, model], force=force, quiet=quiet) as output:
        output.problems += _check(rank, energy, max_rank, method, dtype, seed)
        opened = [
            output.open(lambda path=path, label=label: open_checkpoint(path, label))
            for path, name in ((base, "base"), (model, "model"))
            for label in [f"{name} ({os.fspath(path)})"]
        ]
        before, after = opened
        if before is not None and after is not None:
            output.problems += _compare(before, after)
        output.begin()
        assert before is not None
        assert after is not None
        chooser = Chooser(modules, exclude, after.config, fan_in_fan_out)
        report = ExtractReport(str(output.out.absolute()), os.fspath(base), os.fspath(model))
        report.warnings = [*before.warnings, *after.warnings]
        options = {"rank": rank, "energy": energy, "most": max_rank, "method": method}
        work = _Work(before, after, chooser, options, CODES[dtype], seed, prefix, report)
        work.run(output.recorder, save_changed)
        output.recorder.phase("write", 0)
        write(work.adapter(), output.path, dtype)
        return output.publish(report, EXTRACT_REPORT)


def _check(rank: Any, energy: Any, max_rank: Any, method: str, dtype: str, seed: Any) -> list[str]:
    problems: list[str] = []
    where = "extract_lora"
    try:
        check_rank(rank, energy, "svd", where)
    except RequestError as error:
        problems += error.problems
    whole = isinstance(max_rank, int) and not isinstance(max_rank, bool) and max_rank >= 1
    if max_rank is not None and not whole:
        problems.append(f"{where}: max_rank: expected an integer >= 1, got {max_rank!r}")
    if max_rank is not None and energy is None:
        problems.append(f"{where}: max_rank: is for energy; give a smaller rank instead")
    known = ("auto", "exact", "randomized")
    if method not in known:
        problems.append(
            f"{where}: method: expected one of {', '.join(known)}, got {method!r}"
            f"{nearest(str(method), known)}"
        )
    if dtype not in CODES:
        problems.append(
            f"{where}: dtype: expected one of {', '.join(CODES)}, got {dtype!r}"
            f"{nearest(str(dtype), CODES)}"
        )
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        problems.append(f"{where}: seed: expected an integer in [0, 2**32), got {seed!r}")
    return problems


def _compare(base: Checkpoint, model: Checkpoint) -> list[str]:
    problems: list[str] = []
    for one, other in ((base, model), (model, base)):
        lacks = [n for n in other.tensors if n not in one.tensors and n not in one.tied]
        if lacks:
            shown = ", ".join(f"'{name}'" for name in lacks[:_SHOWN])
            more = f" and {len(lacks) - _SHOWN} more" if len(lacks) > _SHOWN else ""
            problems.append(f"{one.label}: lacks {shown}{more} of {other.label}")
    for name, info in model.tensors.items():
        own = base.tensors.get(name)
        if own is not None and own.shape != info.shape:
            problems.append(
                f"{model.label}: '{name}' has shape {info.shape}, expected {own.shape} like base"
            )
    return problems[: 2 * _SHOWN]


class _Work:
    """Processes the tensors once, collecting the factors."""

    def __init__(
        self,
        base: Checkpoint,
        model: Checkpoint,
        chooser: Chooser,
        options: dict[str, Any],
        code: str,
        seed: int,
        prefix: str,
        report: ExtractReport,
    ) -> None:
        self._base = base
        self._model = model
        self._chooser = chooser
        self._options = options
        self._code = code
        self._seed = seed
        self._prefix = prefix
        self._report = report
        self._factors: dict[str, Factors] = {}
        self._modules: dict[str, Module] = {}
        self._saved: dict[str, tuple[Array, tuple[int, ...]]] = {}

    def run(self, recorder: Recorder, save_changed: bool) -> None:
        tensors = {
            name: info
            for name, info in self._model.tensors.items()
            if name in self._base.tensors and info.dtype in FLOATS
        }
        recorder.phase("extract", sum(info.nbytes for info in tensors.values()))
        total = held = 0.0
        for number, (name, info) in enumerate(sorted(tensors.items())):
            following = sorted(tensors)[number + 1 : number + 2]
            for checkpoint in (self._base, self._model):
                for one in following:
                    checkpoint.will_need(one)
            squares, kept = self._tensor(info, save_changed)
            total, held = total + squares, held + kept
            for checkpoint in (self._base, self._model):
                checkpoint.release(name)
            recorder.advance(info.nbytes)
        if not self._factors and not self._report.unchanged:
            raise RequestError(
                f"{self._model.label}: no module is chosen: expected matrices named *.weight, but "
                "for embeddings and heads unless 'modules' names them"
            )
        if not self._factors:
            raise RequestError(
                f"{self._model.label}: none of the chosen modules differs from the base; nothing "
                "to extract"
            )
        self._report.captured = held / total if total else 1.0

    def _tensor(self, info: TensorInfo, save_changed: bool) -> tuple[float, float]:
        """Return the squared norm of a tensor's change, and the part of it that the adapter
        holds."""
        kind = self._chooser.kind(info)
        if kind is not None:
            return self._module(info, kind)
        squares = math.fsum(
            float(np.vdot(part, part))
            for _, change in self._changes(info)
            for part in [change.astype(np.float64)]
        )
        if squares == 0:
            return 0.0, 0.0
        # PEFT saves modules: a tensor that is not a module's weight or bias has no name there.
        if save_changed and info.name.endswith((".weight", ".bias")):
            array = self._model.array(info.name)
            self._saved[self._prefix + info.name] = (array, info.shape)
            self._report.saved.append(self._prefix + info.name)
            return squares, squares
        self._report.left_out[info.name] = math.sqrt(squares)
        return squares, 0.0

    def _module(self, info: TensorInfo, kind: Kind) -> tuple[float, float]:
        name = self._prefix + info.name.removesuffix(".weight")
        delta = torch.empty(info.numel)
        for start, change in self._changes(info):
            delta[start : start + len(change)] = torch.from_numpy(change)
        norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
        if norm == 0:
            self._report.unchanged.append(name)
            return 0.0, 0.0
        transposed = kind == "embedding" or self._chooser.transposed(info.name)
        matrix = delta.view(info.shape)
        low, error = self._factor(matrix.T if transposed else matrix, norm)
        self._factors[name] = low.b, low.a
        self._modules[name] = Module(name, kind, info.shape, transposed=transposed)
        self._report.modules[name] = Extracted(low.rank, low.energy, error, norm, low.exact)
        return norm**2, norm**2 * max(0.0, 1 - error**2)

    def _changes(self, info: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first element, model - base in float32) for consecutive parts of a tensor."""
        wide = "F64" in (info.dtype, self._base.tensors[info.name].dtype)
        pair = [checkpoint.array(info.name) for checkpoint in (self._base, self._model)]
        for start, stop in slices(info.numel, _AT_ONCE):
            before, after = (widen(array[start:stop], wide) for array in pair)
            for checkpoint, own in ((self._base, before), (self._model, after)):
                if not np.isfinite(own).all():
                    at = int(np.flatnonzero(~np.isfinite(own))[0])
                    raise NonFiniteError(
                        f"{checkpoint.label}: tensor '{info.name}' holds {own[at]} at flat index "
                        f"{start + at}"
                    )
            with np.errstate(over="ignore"):
                yield start, (after - before).astype(np.float32, copy=False)

    def _factor(self, matrix: torch.Tensor, norm: float) -> tuple[LowRank, float]:
        low = factor_matrix(matrix, seed=self._seed, **self._options)
        low = dataclasses.replace(low, b=self._rounded(low.b), a=self._rounded(low.a))
        with torch_threads(1):
            rest = torch.addmm(matrix, torch.from_numpy(low.b), torch.from_numpy(low.a), alpha=-1.0)
            error = float(torch.linalg.vector_norm(rest, dtype=torch.float64)) / norm
        return low, error

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        """Return values as rounded by the output dtype."""
        if self._code == "F32":
            return values
        out = Array.of(np.empty(values.size * DTYPES[self._code], np.uint8), self._code)
        store(out, values.reshape(-1))
        return np.ascontiguousarray(widen(out, False).reshape(values.shape))

    def adapter(self) -> Any:
        """Return the result as an adapter."""
        every = {
            self._prefix + name.removesuffix(".weight")
            for name, info in self._model.tensors.items()
            if name.endswith(".weight") and len(info.shape) >= 2
        }
        config = {
            "base_model_name_or_path": self._report.base,
            "task_type": task_type(self._model.config),
        }
        energies = {name: one.energy for name, one in self._report.modules.items()}
        assert all(math.isfinite(one.error) for one in self._report.modules.values())
        return lora(
            self._factors,
            patterns=self._modules,
            config=config,
            saved=self._saved,
            label="extracted adapter",
            target_modules=shortest(self._factors, every - self._factors.keys()),
            captured=energies,
        )
