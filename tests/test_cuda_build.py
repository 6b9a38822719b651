"""What nvcc makes of csrc/cuda: built for one architecture, no GPU needed."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from pymerge.ops.native import cuda
from pymerge.ops.native import device as cuda_native
from pymerge.ops.native import host as cpu_native
from tests import cuda_build

ARCH = "90"
UNROLLED = 16  # kernels of one dtype are unrolled for up to so many models
POINTS = 8  # of the other ops


@dataclass(frozen=True)
class Report:
    """What the compiler says of one kernel."""

    registers: int
    stack: int
    spilled: int


def kernels(log: str) -> dict[str, Report]:
    """Return the reports in what `ptxas -v` said, by mangled name."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert stack is not None
        assert registers is not None
        found[part[: part.index("'")]] = Report(int(registers[1]), int(stack[1]), int(stack[2]))
    return found


@pytest.fixture(scope="module")
def built() -> tuple[Path, dict[str, Report]]:
    if cuda_build.build_module().find_nvcc() is None:
        if os.environ.get("PYMERGE_REQUIRE_NVCC") == "1":
            pytest.fail("PYMERGE_REQUIRE_NVCC=1, but nvcc was not found")
        pytest.skip("nvcc was not found")
    library, logs = cuda_build.build_for_device(ARCH)
    reports = {}
    for log in logs.values():
        reports |= kernels(log)
    return library, reports


def of_models(reports: dict[str, Report], kind: str) -> dict[tuple[int, str], Report]:
    """Return the reports of a kind of kernel, by number of models and the rest of its name."""
    pattern = rf"{kind}I(?:NS0_\d+(\w+?)E)?Li(\d+)E(.*)EEvNS0_5TableE"
    found = {}
    for name, report in reports.items():
        match = re.search(pattern, name)
        if match is not None:
            found[int(match[2]), f"{match[1]} {match[3]}"] = report
    return found


@pytest.mark.parametrize(
    ("kind", "variants", "most"),
    [
        ("ties_kernel", 3 * 4, UNROLLED),
        ("weighted_sum_kernel", 3 * 2, UNROLLED),
        ("floor_kernel", 1, UNROLLED + 1),
    ],
)
def test_kernels_of_one_dtype(
    built: tuple[Path, dict[str, Report]], kind: str, variants: int, most: int
) -> None:
    """Every number of models has its kernel; up to 8 models stay in registers, and two blocks of
    256 threads on a multiprocessor."""
    found = of_models(built[1], kind)
    assert len(found) == variants * most
    assert {count for count, _ in found} == set(range(1, most + 1))
    for name, report in found.items():
        if name[0] <= 8:
            assert (report.stack, report.spilled) == (0, 0), name
            assert report.registers <= (80 if name[0] <= 4 else 128), name


def test_kernels_of_points(built: tuple[Path, dict[str, Report]]) -> None:
    """Every op over single elements has kernels for 1 .. 8 models of each dtype, and one that
    loops; nearswap has one model."""
    found = of_points(built[1])
    unrolled = [name for name in found if name[0] > 0]
    looping = [name for name in found if name[0] == 0]
    pointwise = pointwise_kinds()
    assert len(unrolled) == 3 * (POINTS * (4 + pointwise - 1) + 1)
    assert len(looping) == 5 * (4 + 2 + 2 + pointwise)
    for name, report in found.items():
        assert (report.stack, report.spilled) == (0, 0), name
        assert report.registers <= (80 if name[0] <= 4 else 128), name


def pointwise_kinds() -> int:
    """Return how many kinds of pointwise_ there are."""
    return (cuda_build.ROOT / "csrc" / "pointwise.def").read_text().count("\nPM_POINTWISE(")


def of_points(reports: dict[str, Report]) -> dict[tuple[int, str], Report]:
    found = {}
    for name, report in reports.items():
        match = re.search(r"point_kernelI.*?Li(\d+)E", name)
        if match is not None:
            found[int(match[1]), name] = report
    return found


@pytest.mark.parametrize(
    ("kind", "count", "most"),
    [
        ("magnitude_kernel", 5 * 3, 80),
        ("any_ties_kernel", 2, 80),
        ("any_weighted_sum_kernel", 2, 80),
        ("row_sum_kernel", 5, 80),
        ("divergence_kernel", 5 * 3, 80),
        ("importance_kernel", 5 * 2, 80),
        ("terms_kernel", 5 * 7, 80),
        ("packed_sum_kernel", 5, 80),
        ("packed_dots_kernel", 5, 80),
        ("pcb_kernel", 4 * 2 * (POINTS + 1), 80),
        # A sum for each pair of models: they take the registers that they take.
        ("pairs_kernel", 3 * (3 * POINTS + 5), 255),
    ],
)
def test_other_kernels(
    built: tuple[Path, dict[str, Report]], kind: str, count: int, most: int
) -> None:
    found = {name: report for name, report in built[1].items() if kind in name}
    assert len(found) == count
    for name, report in found.items():
        assert (report.stack, report.spilled) == (0, 0), name
        assert report.registers <= most, name


@pytest.mark.parametrize("name", cuda_build.PTX)
def test_arithmetic_is_exact(built: tuple[Path, dict[str, Report]], name: str) -> None:
    """Nothing is fused, approximate or flushed to zero but what is written down: in ties_points.h a
    reciprocal and the four fused operations that make an exact quotient of it; in sum_terms.h
    products of floats in double, which are exact."""
    code = (built[0].parent / f"{name}.ptx").read_text()
    counts = [
        len(re.findall(pattern, code))
        for pattern in (
            r"\bfma\.rn\.f32\b",
            r"\.approx\b",
            r"\.ftz\b",
            r"\brcp\.approx\.ftz\.f32\b",
        )
    ]
    # Kernels for 3 .. 16 models, with statistics and without, 4 floats in 16 bytes.
    quotients = 14 * 2 * 4 if name == "ties_f32" else 0
    assert counts == [4 * quotients, quotients, quotients, quotients]
    fused = len(re.findall(r"\bfma\.", code))
    if name in ("chunk_pairs", "chunk_sums", "packed"):
        assert fused == len(re.findall(r"\bfma\.rn\.f64\b", code)) > 0
    else:
        assert fused == counts[0]
    vectors = name in ("magnitudes", "packed", "sums") or name.endswith("f32")
    assert ("ld.global.nc.L1::no_allocate.v4" in code) == vectors


def test_only_the_table_is_exported(built: tuple[Path, dict[str, Report]]) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    listed = subprocess.run(
        [nm, "-D", "--defined-only", str(built[0])], check=True, stdout=subprocess.PIPE, text=True
    )
    assert [line.split()[-1] for line in listed.stdout.splitlines()] == ["pymerge_cuda_table"]


def test_library_loads_with_and_without_a_gpu(built: tuple[Path, dict[str, Report]]) -> None:
    native, error = cpu_native.load()
    if native is None:
        pytest.skip(f"the native library is not there: {error}")
    native.load_cuda(str(built[0]))
    try:
        native.check(0, 0)
    except RuntimeError as error:
        assert re.search(r"the device failed: .*\(cudaError\w+\)", str(error))
    finally:
        native.load_cuda("" if cuda.reason() else str(cuda_native.LIBRARY))


def test_another_library_is_refused() -> None:
    native, error = cpu_native.load()
    if native is None:
        pytest.skip(f"the native library is not there: {error}")
    assert native.__file__ is not None
    other = Path(native.__file__)
    with pytest.raises(RuntimeError, match="is not pymerge's CUDA library"):
        native.load_cuda(str(other))
    with pytest.raises(RuntimeError, match=r"/nowhere/_cuda\.so"):
        native.load_cuda("/nowhere/_cuda.so")
    with pytest.raises(RuntimeError, match="the CUDA library is not loaded"):
        native.begin(0, 0)
    native.load_cuda("" if cuda.reason() else str(cuda_native.LIBRARY))


@pytest.mark.parametrize("same", [True, False])
def test_a_library_of_another_table_is_refused(same: bool, tmp_path: Path) -> None:
    """By the hash of kernel_table.h and the .def files, the first word of its table."""
    native, error = cpu_native.load()
    command = cuda_build.compiler()
    if native is None or command is None:
        pytest.skip(f"the native library or a compiler is not there: {error}")
    value = cuda_build.abi() if same else "0x0123456789abcdefULL"
    source, library = tmp_path / "other.cpp", tmp_path / "_cuda.so"
    source.write_text(
        f"static const unsigned long long table[64] = {{{value}}};\n"
        'extern "C" const void* pymerge_cuda_table() { return table; }\n'
    )
    subprocess.run([command, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    try:
        if same:
            native.load_cuda(str(library))
            return
        with pytest.raises(
            RuntimeError,
            match=rf"_cuda\.so was built from another kernel table \(0123456789abcdef\) than "
            rf"pymerge\._C \({native.abi}\); build both from the same sources: PYMERGE_CUDA=1 pip",
        ):
            native.load_cuda(str(library))
        with pytest.raises(RuntimeError, match="the CUDA library is not loaded"):
            native.begin(0, 0)
    finally:
        native.load_cuda("" if cuda.reason() else str(cuda_native.LIBRARY))


@pytest.fixture(name="module")
def build_module() -> SimpleNamespace:
    return cuda_build.build_module()


def test_architectures(module: SimpleNamespace) -> None:
    assert module.gencode("80;90a;120+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=[sm_120,compute_120]",
    ]
    for wrong in ("", "sm_90", "90,100", "90;", "75"):
        with pytest.raises(module.BuildError, match="PYMERGE_CUDA_ARCHS is"):
            module.gencode(wrong)


def test_default_architectures_are_those_that_the_compiler_knows(
    module: SimpleNamespace, tmp_path: Path
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    assert module.default_archs(str(nvcc)) == "80;90+PTX"


def test_no_compiler(module: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "/no/nvcc")
    assert module.find_nvcc() is None
    with pytest.raises(module.BuildError, match="nvcc was not found"):
        module.build(Path("_cuda.so"), Path("objects"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_what_the_compiler_says_is_shown(module: SimpleNamespace, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) exit 0;; esac\necho out of luck; exit 1\n'
    )
    nvcc.chmod(0o755)
    with pytest.raises(module.BuildError, match="out of luck"):
        module.build(tmp_path / "_cuda.so", tmp_path, archs="90", nvcc=str(nvcc))
    assert not (tmp_path / "_cuda.so").exists()


def test_reason_names_what_is_missing() -> None:
    reason = cuda.reason()
    if cuda_native.LIBRARY.is_file():
        assert reason is None or "CUDA" in reason
    else:
        assert reason is not None
        assert "PYMERGE_CUDA=1" in reason


def test_table_of_the_library(built: tuple[Path, dict[str, Report]]) -> None:
    """Its first word is the hash that _C expects."""
    native, _ = cpu_native.load()
    library = ctypes.CDLL(str(built[0]))
    library.pymerge_cuda_table.restype = ctypes.POINTER(ctypes.c_uint64)
    found = f"{library.pymerge_cuda_table()[0]:016x}"
    assert cuda_build.abi() == f"0x{found}ULL"
    assert native is None or native.abi == found
