"""What is built and installed: one package, complete, that needs nothing beside it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import pymerge

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTION = "pymerge-kernels"
NOT_SOURCES = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*cache"
)
BUILDS = pytest.mark.packaging


@pytest.fixture(name="installed")
def find_installed() -> importlib.metadata.Distribution:
    """The distribution; a source tree that is merely on sys.path has none."""
    try:
        return importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{DISTRIBUTION} is not installed in this environment (`make test` does it)")


def test_one_version(installed: importlib.metadata.Distribution) -> None:
    native = importlib.import_module("pymerge._C")
    assert pymerge.__version__ == installed.version
    assert pymerge.__version__ == native.version


@pytest.mark.usefixtures("installed")
def test_triton_kernels_is_inside_pymerge() -> None:
    triton_kernels = importlib.import_module("pymerge.triton_kernels")
    assert Path(str(triton_kernels.__file__)).parent.name == "triton_kernels"


def test_triton_kernels_refuses_the_name_of_another_project() -> None:
    path = ROOT / "triton_kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location("triton_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"'pymerge\.triton_kernels'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [re.match(r"([\w.-]+)==[\w.]+(; python_version .*)?$", line) for line in lines]
    assert all(
        pin or not line or line.startswith("#") for pin, line in zip(pins, lines, strict=True)
    )
    return {normal(pin[1]) for pin in pins if pin}


def test_every_requirement_is_pinned(installed: importlib.metadata.Distribution) -> None:
    names = {normal(re.split(r"[^\w.-]", line)[0]) for line in installed.requires or []}
    assert "torch" in names
    assert names - {DISTRIBUTION} - pinned() == set()


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command away from the source tree and from this environment's variables."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "CC", "CXX") and not name.startswith("PYMERGE_")
    }
    pins = str(ROOT / "constraints.txt")
    environment |= {"PIP_CONSTRAINT": pins, "PIP_BUILD_CONSTRAINT": pins, "PYMERGE_CUDA": "0"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def succeed(*command: str | Path, cwd: Path, **variables: str) -> str:
    done = run(*command, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout
    return done.stdout


def copy_of_sources(folder: Path) -> Path:
    return Path(shutil.copytree(ROOT, folder / "sources", ignore=NOT_SOURCES))


def stand_in_for_nvcc(folder: Path) -> Path:
    """A compiler that makes empty files: the real one takes minutes."""
    program = folder / "nvcc"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *--list-gpu-arch*) echo compute_90;; esac\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done; exit 0\n'
    )
    program.chmod(0o755)
    return program


def fresh_environment(folder: Path) -> Path:
    """Return the Python of a new environment that finds torch and the like in the present one."""
    succeed(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site = succeed(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    ).strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def check_installed(python: Path, origin: Path, folder: Path) -> None:
    """The package is imported from `origin`, with its native part, and its program starts."""
    code = (
        "import importlib.util, pymerge, pymerge._C, pymerge.triton_kernels;"
        "assert importlib.util.find_spec('triton_kernels') is None, 'top-level triton_kernels';"
        "print(pymerge.__file__, pymerge._C.version, sep='\\n')"
    )
    file, version = succeed(python, "-I", "-c", code, cwd=folder).split()
    assert Path(file).is_relative_to(origin)
    assert version == pymerge.__version__
    assert pymerge.__version__ in succeed(python.parent / "pymerge", "--version", cwd=folder)


def modules_of_sources() -> set[str]:
    modules = {
        f"pymerge/{path.relative_to(ROOT / 'pymerge')}" for path in ROOT.glob("pymerge/**/*.py")
    }
    twins = ROOT.glob("triton_kernels/**/*.py")
    return modules | {f"pymerge/{path.relative_to(ROOT)}" for path in twins}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist, and the wheel built from what is in that sdist, in isolation."""
    folder = tmp_path_factory.mktemp("distributions")
    sources = copy_of_sources(folder)
    succeed(
        *(sys.executable, "-m", "build", "--outdir", folder / "dist", sources),
        cwd=folder,
        PYMERGE_CUDA="1",
        NVCC=str(stand_in_for_nvcc(folder)),
    )
    (sdist,) = folder.glob("dist/*.tar.gz")
    (wheel,) = folder.glob("dist/*.whl")
    return sdist, wheel


@BUILDS
def test_sdist_is_complete(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    wanted = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*")}
    wanted |= {"setup.py", "LICENSE", "constraints.txt", "Makefile", "tests/conftest.py"}
    assert wanted - names == set()
    assert [name for name in names if name.endswith((".so", ".o", ".pyc"))] == []


@BUILDS
def test_wheel_is_one_package(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    information = f"pymerge_kernels-{pymerge.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"pymerge", information}
    assert {name for name in names if name.endswith(".py")} == modules_of_sources()
    assert "pymerge/py.typed" in names
    assert "pymerge/analysis/assets/report.js" in names
    assert f"{information}/licenses/LICENSE" in names
    assert f"pymerge/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert "pymerge/_cuda.so" in names
    assert [name for name in names if name.endswith((".h", ".def", ".cpp", ".o"))] == []


@BUILDS
def test_wheel_in_a_fresh_environment(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    python = fresh_environment(tmp_path)
    succeed(python, "-m", "pip", "install", "--no-deps", distributions[1], cwd=tmp_path)
    check_installed(python, tmp_path / "venv", tmp_path)


@BUILDS
def test_editable_install(tmp_path: Path) -> None:
    sources = copy_of_sources(tmp_path)
    python = fresh_environment(tmp_path)
    install = (python, "-m", "pip", "-v", "install", "--no-deps", "-e", sources)
    count = sum(1 for part in ("bind", "cpu") for _ in sources.glob(f"csrc/{part}/*.cpp"))
    assert re.search(
        rf"pymerge: ({count}|{count - 2}) of \1 files", succeed(*install, cwd=tmp_path)
    )
    check_installed(python, sources / "pymerge", tmp_path)

    check_symbols_of_instruction_sets(sources)
    assert "pymerge: 0 of" in succeed(*install, cwd=tmp_path)
    sources.joinpath("csrc", "cpu", "tables.cpp").touch()
    assert "pymerge: 1 of" in succeed(*install, cwd=tmp_path)
    check_installed(python, sources / "pymerge", tmp_path)
    check_cuda_in_place(install, sources, tmp_path)


def check_cuda_in_place(install: tuple[str | Path, ...], sources: Path, folder: Path) -> None:
    """The CUDA library appears where it is wanted, compiled once, and goes where it is not."""
    nvcc = str(stand_in_for_nvcc(folder))
    count = len(runpy.run_path(str(sources / "csrc" / "cuda" / "build.py"))["units"]())
    for stale in (count, 0):
        said = succeed(*install, cwd=folder, PYMERGE_CUDA="auto", NVCC=nvcc)
        assert f"pymerge: building with CUDA: {nvcc} (PYMERGE_CUDA=auto)" in said
        assert f"pymerge: CUDA for 90+PTX: {stale} of {count} files" in said
        assert sources.joinpath("pymerge", "_cuda.so").is_file()
    assert "building without CUDA: PYMERGE_CUDA=0" in succeed(*install, cwd=folder)
    assert not sources.joinpath("pymerge", "_cuda.so").exists()


def check_symbols_of_instruction_sets(sources: Path) -> None:
    """The objects of one instruction set define nothing that the linker could take for another's.

    Inline functions are weak symbols: of those compiled for AVX-512 and for any machine, one stays.
    """
    objects = [path for path in sources.glob("build/**/isa_*.o") if "baseline" not in path.name]
    assert objects or "x86_64" not in sysconfig.get_platform()
    for path in objects:
        listed = succeed("nm", "-C", "--extern-only", "--defined-only", path, cwd=sources)
        isa = path.stem.removeprefix("isa_")
        assert [line.split(" ", 2)[2] for line in listed.splitlines()] == [
            f"pymerge::{isa}_table()"
        ]


@BUILDS
def test_without_native_part(tmp_path: Path) -> None:
    wheel = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path)
    succeed(*wheel, copy_of_sources(tmp_path), cwd=tmp_path, PYMERGE_NATIVE="0", CXX="/no/c++")
    (built,) = tmp_path.glob("*.whl")
    assert built.name == f"pymerge_kernels-{pymerge.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(built) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == []


@BUILDS
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CXX": "/no/c++", "CC": "/no/cc"}, "needs a C\\+\\+17 compiler"),
        (
            {"PYMERGE_CUDA": "1", "NVCC": "/no/nvcc"},
            "PYMERGE_CUDA=1 cannot be fulfilled: nvcc was not found",
        ),
        (
            {"PYMERGE_CUDA": "1", "PYMERGE_NATIVE": "0"},
            "PYMERGE_CUDA=1 cannot be fulfilled: the native part",
        ),
        ({"PYMERGE_CUDA": "yes"}, "PYMERGE_CUDA is 'yes', expected one of auto, 0, 1"),
        ({"PYMERGE_NATIVE": "no"}, "PYMERGE_NATIVE is 'no', expected one of 0, 1"),
        ({"PYMERGE_BUILD_JOBS": "0"}, "PYMERGE_BUILD_JOBS is '0', expected a whole number"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_failed_build_says_why(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    wheel = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path)
    done = run(*wheel, copy_of_sources(tmp_path), cwd=tmp_path, **variables)
    assert done.returncode != 0
    assert re.search(message, done.stdout), done.stdout
    assert "Traceback" not in done.stdout
    assert list(tmp_path.glob("*.whl")) == []


@BUILDS
@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="only make's environment is pinned")
def test_everything_installed_is_pinned() -> None:
    present = {normal(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    # What comes with Python, and what torch pins by itself.
    exempt = {DISTRIBUTION, "pip", "setuptools"}
    exempt |= {name for name in present if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert present - exempt - pinned() == set()
