"""Who runs an op: the fastest backend that has it, and what the report says of that."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import pymerge
from pymerge.merging.gpu.place import Place, choose_place, planned_device
from pymerge.merging.report import MergeReport
from pymerge.methods import METHODS, MethodSpec
from pymerge.ops import runner
from pymerge.ops.backends import BACKENDS, choose, describe, has_kernel
from pymerge.ops.native import cpu
from pymerge.ops.runner import Runner
from pymerge.ops.triton import library as triton
from tests import models
from tests.host_device import HostDevice

no_waiting = models.no_waiting


def test_every_backend_has_every_op_that_it_says() -> None:
    from pymerge.ops.contract import NAMES

    for name in ("reference", "cpu"):
        assert all(has_kernel(name, op) for op in NAMES), name
    for name in BACKENDS:
        assert has_kernel(name, "packed_sum_"), name
        assert has_kernel(name, "packed_dots_"), name
    assert not has_kernel("cpu", "fisher_")


def test_a_missing_kernel_is_replaced_by_the_next_backend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, tuned = models.llama(2, layers=1, hidden=8, mlp=8, vocabulary=16)
    models.save_family(tmp_path, base, tuned)
    config = models.config(tmp_path, "breadcrumbs", 2, density=0.5)
    expected = pymerge.merge("breadcrumbs", base, tuned, density=0.5)
    monkeypatch.delattr(cpu, "sparse_merge")
    assert choose("sparse_merge_", "auto") == "reference"
    assert choose("ties_", "auto") == "cpu"
    models.assert_same(pymerge.merge("breadcrumbs", base, tuned, density=0.5), expected)
    with pytest.raises(AttributeError):
        pymerge.merge_checkpoints(config, tmp_path / "out", backend="cpu")


def test_one_backend_for_each_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "triton"):
        monkeypatch.setattr(BACKENDS[name], "reason", lambda: None)
    monkeypatch.setattr(triton, "interprets", lambda: False)
    assert choose("ties_", None, "cuda:1") == "cuda"
    assert choose("ties_", "auto", "cuda:1", without=["cuda"]) == "triton"
    assert choose("ties_", "auto", "cuda:1", without=["cuda", "triton"]) == "reference"
    assert choose("ties_", "triton", "cuda:1", without=["triton"]) == "triton"
    assert choose("ties_", "auto", "cpu") == "cpu"
    monkeypatch.delattr(BACKENDS["cuda"], "ties")
    assert choose("ties_signs_", "auto", "cuda") == "triton"
    assert describe()["auto"]["cuda"].startswith("cuda, ")
    assert describe()["auto"]["cpu"].startswith("cpu, ")
    monkeypatch.setattr(BACKENDS["cuda"], "reason", lambda: "no library")
    monkeypatch.setattr(BACKENDS["triton"], "reason", lambda: "no GPU")
    assert describe()["auto"]["cuda"] == "reference; cuda: no library; triton: no GPU"


def test_counters_are_where_ops_count() -> None:
    assert isinstance(runner.zeros("cpu", (2, 3), "int32"), np.ndarray)
    assert isinstance(runner.zeros(Runner("cpu"), (3,), "int64"), np.ndarray)
    on_meta = Runner("reference", "meta").zeros((3,), "float64")
    assert (on_meta.device.type, on_meta.dtype) == ("meta", torch.float64)
    counted = torch.tensor([1, 2])
    copy = runner.fetched(counted)
    counted += 1
    assert copy.tolist() == [1, 2]


@pytest.mark.usefixtures("no_waiting")
def test_the_report_says_what_ran_and_why(tmp_path: Path) -> None:
    base, tuned = models.llama(2, layers=1, vocabulary=1100)
    models.save_family(tmp_path, base, tuned)
    config = models.config(tmp_path, "ties", 2, density=0.3)
    report = pymerge.merge_checkpoints(config, tmp_path / "out")
    ops = {"magnitude_equal_counts_", "magnitude_histogram_", "ties_"}
    assert report.backends == dict.fromkeys(sorted(ops), "cpu")
    assert report.why == "the fastest on the CPU, where files are merged by default"
    named = pymerge.merge_checkpoints(config, tmp_path / "named", backend="reference")
    assert set(named.backends.values()) == {"reference"}
    assert named.why == "it was asked for"
    read = MergeReport.from_json((tmp_path / "out" / "pymerge_report.json").read_text())
    assert (read.backends, read.why, read.peak_device) == (report.backends, report.why, 0)


def test_places() -> None:
    ties, svd = METHODS["ties"], METHODS["tsv_m"]
    device = HostDevice()

    def place(method: MethodSpec, name: str, backend: str | None) -> Place:
        return choose_place(method, name, backend, lambda _: device)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert place(ties, "auto", None).device is None
        assert place(ties, "cpu", "auto").backend == "cpu"
        assert place(ties, "cuda", None).device is device
        assert place(ties, "cuda:0", "auto").backend == "auto"
        assert place(ties, "cuda", "reference").backend == "reference"
        assert place(svd, "cuda", "auto").device is None
    for asked, expected in (
        (("cuda", "cpu"), "backend: 'cpu' computes on cpu tensors"),
        (("gpu", None), "device: expected auto, cpu, cuda or cuda:N; got 'gpu'"),
    ):
        with pytest.raises(pymerge.RequestError, match=expected):
            place(ties, *asked)
    assert planned_device(ties, "auto", "auto") == "cpu"
    assert planned_device(ties, "auto", "cuda") == "cuda"
    assert planned_device(ties, "cuda:1", None) == "cuda:1"
    assert planned_device(svd, "cuda:1", None) == "cpu"
