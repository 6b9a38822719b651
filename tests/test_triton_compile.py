"""The Triton kernels compile without a GPU, for NVIDIA and AMD, and into the code that they should.

What compiles is what the backend would have launched. What the interpreter cannot show is looked
for in the code: no fused or approximate arithmetic, no flushed subnormals, hardware rounding to
nearest even, wide loads, no spilled registers.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pymerge.ops.triton import backend as triton
from pymerge.ops.triton import library as triton_common
from tests.case import make_inputs
from tests.test_triton import needs_triton, process
from tests.triton_checks import BY_NAME

pytestmark = needs_triton

# Kernels that wait for memory, each in a mode or two.
CASES = [
    "linear",
    "task_arithmetic",
    "ties_mean_signs",
    "ties_mergekit",
    "ties_signs",
    "magnitude_histogram",
    "sparse_all",
    "consensus_ta",
    "row_task_arithmetic",
]
# Kernels that compute more than they wait, whose code grows with the pairs of models.
PAIRWISE = ["pcb_paper", "pcb_vision_es", "sums_gram", "sums_sparse", "sums_pcb_exp"]
# Every other mode of the kernels of one pass.
MODES = [
    "dare_linear",
    "breadcrumbs_ties",
    "della",
    "della_linear",
    "breadcrumbs_rows",
    "nearswap",
    "ram",
    "magmax",
    "tall_masks",
    "emr_task",
    "variance",
    "sce",
    "sce_everywhere",
    "row_weighted_sum",
    "pcb_root",
    "pcb_vision",
    "pcb_paper_scores",
    "pcb_vision_es_scores",
    "sums_sparse.ranked",
    "sums_gram.rows",
    "sums_dots",
    "sums_statistics",
    "sums_ram_counts",
    "sums_emr",
    "sums_sce",
    "sums_pcb_extremes",
    "packed_sum",
    "packed_dots",
    "divergence_maxima",
    "divergence_exp",
    "divergence_divergence",
    "divergence_divergence.rows",
    "row_importance",
    "arcee_fusion",
]
AMD = [*CASES, "pcb_paper", "sums_gram", "sums_statistics", "packed_sum", "packed_dots"]
DIVIDES = {
    "linear",
    "ties_mean_signs",
    "ties_mergekit",
    "ties_peft_frequency",
    "breadcrumbs_ties",
    "breadcrumbs_rows",
    "sparse_all",
    "della",
    "nearswap",
    "ram",
    "variance",
    "sce",
    "sce_everywhere",
    "pcb_paper",
    "pcb_root",
    "pcb_vision",
    "pcb_vision_es",
    "pcb_vision_es_scores",
    "sums_sce",
    "divergence_divergence",
    "divergence_divergence.rows",
}
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
TARGETS: dict[str, tuple[str, Any, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


# In the other process ---------------------------------------------------------------------------


def launched(
    case: str, count: int, dtype: torch.dtype, numel: int, misaligned: bool = False
) -> Any:
    """Return what the backend would launch for a case."""
    kernels = importlib.import_module("pymerge.triton_kernels.launch")
    calls: list[Any] = []
    with (
        mock.patch.object(triton, "reason", return_value=None),
        mock.patch.object(triton, "device", return_value="cpu"),
        mock.patch.object(triton_common, "device", return_value="cpu"),
        mock.patch.object(triton_common, "_load", return_value=(kernels, None)),
        mock.patch.object(kernels, "run", calls.append),
    ):
        wide = dtype == torch.float64
        inputs = make_inputs(numel, count, [dtype], misaligned=misaligned)
        BY_NAME[case].run(inputs, dtype, "triton", wide)
    (call,) = calls
    return call


class Driver:
    """The driver of GPUs that are not there: one of each target."""

    target = "sm_90"

    def get_current_target(self) -> Any:
        compiler = importlib.import_module("triton.backends.compiler")
        return compiler.GPUTarget(*TARGETS[self.target])

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(
    case: str, count: int, dtype: str, folder: str, target: str, numel: int = 4096
) -> dict[str, Any]:
    """Compile what a case launches; return the code, and which registers it takes."""
    os.environ["TRITON_CACHE_DIR"] = folder
    triton = importlib.import_module("triton")
    driver = Driver()
    driver.target = target
    triton.runtime.driver.set_active(driver)
    kernels = importlib.import_module("pymerge.triton_kernels.launch")
    call = launched(case, count, DTYPES[dtype], numel)
    keywords = call.keywords(kernels.default_config(call))
    # All that a launch does, but for the launch.
    done = kernels.KERNELS[call.kernel].run(grid=(1,), warmup=True, **keywords)
    if target == "gfx942":
        return {"code": done.asm["amdgcn"], "bytes": len(done.asm["hsaco"])}
    cubin = Path(folder) / f"{case}-{count}-{dtype}-{numel}-{target}.cubin"
    cubin.write_bytes(done.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return {"code": done.asm["ptx"], "registers": registers, "spilled": stack + local}


def aligned(misaligned: bool) -> bool:
    return launched("linear", 17, torch.bfloat16, 100, misaligned).arguments["ALIGNED"]


def amd_is_there() -> bool:
    return "amd" in importlib.import_module("triton.backends").backends


# In this process --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Compile a case in a process without the interpreter."""
    folder = str(tmp_path_factory.mktemp("triton"))
    with process(interpret=False) as call:
        yield lambda case, count, dtype, target, *more: call(
            compiled, case, count, dtype, folder, target, *more
        )


@pytest.fixture(scope="session")
def has_amd() -> bool:
    with process(interpret=False) as call:
        return bool(call(amd_is_there))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_code_for_hopper(case: str, count: int, dtype: str, compiler: Callable[..., Any]) -> None:
    built = compiler(case, count, dtype, "sm_90")
    assert built["spilled"] == 0
    assert built["registers"] <= 168  # three blocks of 128 threads run side by side
    # 16 bytes of base and of each model at a time.
    assert len(re.findall(r"ld\.global\.v4\.b32", built["code"])) >= count + (case != "linear")
    check_arithmetic(built["code"], case, dtype)


def check_arithmetic(code: str, case: str, dtype: str) -> None:
    """Two roundings, whole subnormals, IEEE division, nearest even at the store."""
    for forbidden in ("fma.rn.f", "mad.f", ".ftz", "div.full", "div.approx", "rcp"):
        assert forbidden not in code, forbidden
    width = "f64" if dtype == "f64" or case.startswith("divergence") else "f32"
    assert (f"div.rn.{width}" in code) == (case in DIVIDES)
    assert ("cvt.rn.bf16" in code) == (BY_NAME[case].streams_out and dtype == "bf16")


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("case", PAIRWISE)
def test_code_of_pairs(case: str, count: int, compiler: Callable[..., Any]) -> None:
    built = compiler(case, count, "bf16", "sm_90")
    assert built["spilled"] == 0
    check_arithmetic(built["code"], case, "bf16")


@pytest.mark.parametrize(
    ("case", "count", "dtype"),
    [
        *((case, 4, "bf16") for case in MODES),
        ("ties_max", 4, "bf16"),
        ("ties_peft_frequency", 4, "bf16"),
        ("ties_mergekit", 16, "bf16"),
        ("ties_mergekit", 16, "f32"),
        ("ties_mergekit", 16, "f64"),
        ("ties_mergekit", 17, "bf16"),
        ("linear", 17, "f32"),
        ("magnitude_histogram", 17, "bf16"),
        ("task_arithmetic", 3, "f64"),
        ("magnitude_equal_counts", 1, "bf16"),
        ("sparse_all", 16, "bf16"),
        ("sparse_all", 17, "bf16"),
        ("consensus_ta", 17, "f32"),
        ("row_task_arithmetic", 17, "bf16"),
        ("packed_sum", 4, "f64"),
        ("packed_dots", 4, "f64"),
        ("sums_gram", 4, "f64"),
        ("sums_gram", 9, "bf16"),
        ("sums_pcb_exp", 9, "bf16"),
        ("sums_sce", 9, "bf16"),
        ("pcb_paper", 9, "bf16"),
        ("pcb_vision_es", 9, "bf16"),
    ],
)
def test_other_code_for_hopper(
    case: str, count: int, dtype: str, compiler: Callable[..., Any]
) -> None:
    """Other dialects, the largest unrolled kernels, those that loop over models, and doubles."""
    built = compiler(case, count, dtype, "sm_90")
    assert built["spilled"] == 0
    if count == 17:  # one wide load of models of each dtype
        assert len(re.findall(r"ld\.global\.v[24]", built["code"])) >= 4
    check_arithmetic(built["code"], case, dtype)


@pytest.mark.parametrize("count", [2, 8, 9])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_code_of_packed(count: int, dtype: str, compiler: Callable[..., Any]) -> None:
    """What is as long as the tensor is read and written 16 bytes at a time; places are counted by
    the threads of a warp."""
    for case in ("packed_sum", "packed_dots"):
        built = compiler(case, count, dtype, "sm_90")
        assert built["spilled"] == 0
        assert built["registers"] <= 96
        check_arithmetic(built["code"], case, dtype)
    wide = 1 if dtype == "bf16" else 2
    code = compiler("packed_sum", count, dtype, "sm_90")["code"]
    assert len(re.findall(r"ld\.global\.v4\.b32", code)) == wide
    assert len(re.findall(r"st\.global\.v4\.b32", code)) == wide
    assert "bar.sync" not in code


def test_looping_kernels_are_told_of_alignment() -> None:
    with process(interpret=False) as call:
        assert call(aligned, False)
        assert not call(aligned, True)


def test_any_length_compiles(compiler: Callable[..., Any]) -> None:
    """Where the length is no multiple of 16, loads are narrow, and that is all."""
    built = compiler("ties_mean_signs", 3, "bf16", "sm_90", 4097)
    assert built["spilled"] == 0
    check_arithmetic(built["code"], "ties_mean_signs", "bf16")


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_other_generations(target: str, compiler: Callable[..., Any]) -> None:
    for case in (
        "task_arithmetic",
        "ties_mean_signs",
        "magnitude_histogram",
        "sparse_all",
        "packed_sum",
        "packed_dots",
        "pcb_paper",
        "sums_gram",
    ):
        built = compiler(case, 4, "bf16", target)
        assert built["spilled"] == 0
        check_arithmetic(built["code"], case, "bf16")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, "bf16") for case in AMD),
        ("ties_mean_signs", "f32"),
    ],
)
def test_code_for_amd(case: str, dtype: str, compiler: Callable[..., Any], has_amd: bool) -> None:
    if not has_amd:
        pytest.skip("this triton was built without AMD's backend")
    built = compiler(case, 4, dtype, "gfx942")
    assert built["bytes"] > 0
    assert re.search(r"\.vgpr_spill_count:\s*0\b", built["code"])
    if case not in DIVIDES:  # a division is made of such operations
        assert not re.search(r"\bv_(pk_)?(fma|fmac|mad|mac)_f", built["code"])
    # Subnormals of both widths are kept, in and out.
    assert re.search(r"\.amdhsa_float_denorm_mode_32 3\b", built["code"])
    assert re.search(r"\.amdhsa_float_denorm_mode_16_64 3\b", built["code"])
