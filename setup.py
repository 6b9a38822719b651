"""Build the native part of pymerge. Everything that can be declared is in pyproject.toml.

Environment:
  PYMERGE_NATIVE=0          install without the native part (the reference backend remains)
  PYMERGE_CUDA=auto|0|1     whether to build the CUDA library (auto: where nvcc is found)
  PYMERGE_CUDA_ARCHS        GPU architectures (default: those of "80;90;100;120+PTX" nvcc knows)
  NVCC                      the CUDA compiler
  PYMERGE_BUILD_JOBS=N      compilers to run at a time (default: one per usable core)
  CXX                       the C++17 compiler
"""

from __future__ import annotations

import json
import os
import platform
import runpy
import shlex
import sys
import sysconfig
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # One config gives the same bytes everywhere: no fused multiply-add that is not written down.
    "-ffp-contract=off",
    # Nobody reads errno or traps here; with them the loops do not vectorise.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]
# One source per instruction set, chosen at run time; never -march=native.
ISA_FLAGS = {
    "isa_avx2": ["-march=x86-64-v3"],
    "isa_avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
NEEDS = (
    "The native part of pymerge needs a C++17 compiler (g++ 11 or newer, clang++ 12 or newer)\n"
    "and Python's headers: `apt install g++ python3-dev`, `dnf install gcc-c++ python3-devel`,\n"
    "or `xcode-select --install`. CXX=... chooses the compiler.\n"
    "PYMERGE_NATIVE=0 installs without the native part; only the slow reference backend\n"
    "is there then."
)


def stop(reason: str) -> None:
    """End the build with a message that stands alone, without a traceback above it."""
    sys.exit(f"\npymerge: {reason}\n")


def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    """Return the value of an environment variable that has a fixed set of values."""
    value = os.environ.get(name, default)
    if value not in allowed:
        stop(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
    return value


def cuda_module() -> SimpleNamespace:
    """Return what csrc/cuda/build.py defines."""
    return SimpleNamespace(**runpy.run_path(str(CSRC / "cuda" / "build.py")))


def decide_cuda(native: bool) -> str | None:
    """Return the CUDA compiler if the CUDA library is to be built; say aloud what is decided.

    Whether this machine has a GPU plays no part: what is built here may run elsewhere.
    """
    wanted = choice("PYMERGE_CUDA", "auto", ("auto", "0", "1"))
    nvcc, reason = None, "PYMERGE_CUDA=0"
    if not native:
        reason = "the native part, which loads it, is left out (PYMERGE_NATIVE=0)"
    elif sys.platform != "linux":
        reason = "the CUDA library builds on Linux"
    elif wanted != "0":
        nvcc = cuda_module().find_nvcc()
        reason = "nvcc was not found: NVCC=... names one"
    if wanted == "1" and nvcc is None:
        stop(f"PYMERGE_CUDA=1 cannot be fulfilled: {reason}")
    if nvcc is None:
        print(f"pymerge: building without CUDA: {reason}", file=sys.stderr)
    else:
        print(f"pymerge: building with CUDA: {nvcc} (PYMERGE_CUDA={wanted})", file=sys.stderr)
    return nvcc


def prepare_macos() -> None:
    """Build for this machine alone, on the oldest macOS that torch runs on.

    A universal Python would compile each file for two architectures at once, which the
    per-instruction-set files cannot be.
    """
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
    configured = str(sysconfig.get_config_var("MACOSX_DEPLOYMENT_TARGET") or "0")
    if tuple(int(part) for part in configured.split(".")) < (11, 0):
        os.environ.setdefault("MACOSX_DEPLOYMENT_TARGET", "11.0")


def targets_x86_64() -> bool:
    """Return whether the code is compiled for x86-64 and nothing else."""
    if sys.platform == "darwin":
        flags = shlex.split(os.environ.get("ARCHFLAGS", ""))
        return set(flags) == {"-arch", "x86_64"}
    return sysconfig.get_platform().endswith("x86_64")


def isa_flags(source: str) -> list[str]:
    """Return the -march flags of one source."""
    return ISA_FLAGS.get(Path(source).stem, [])


def native_extension() -> Extension:
    """Return `pymerge._C` over the sources for this machine."""
    from pybind11 import get_include

    if sys.platform == "win32":
        stop("the native part builds on Linux and macOS; set PYMERGE_NATIVE=0 to install without")
    if sys.platform == "darwin":
        prepare_macos()
    paths = sorted([*CSRC.glob("bind/*.cpp"), *CSRC.glob("cpu/*.cpp")])
    # The kernels take longest to compile: they go first, so that no core waits for the last one.
    paths.sort(key=lambda path: not path.stem.startswith("isa_"))
    if not paths:
        stop("csrc/ is missing: this source tree is incomplete")
    abi = runpy.run_path(str(CSRC / "abi.py"))["abi"]()
    macros: list[tuple[str, str | None]] = [("PYMERGE_ABI", abi)]
    if not targets_x86_64():
        paths = [path for path in paths if path.stem not in ISA_FLAGS]
        macros.append(("PYMERGE_BASELINE_ONLY", None))
    threads = ["-pthread"] if sys.platform == "linux" else []
    return Extension(
        "pymerge._C",
        sources=[path.relative_to(ROOT).as_posix() for path in paths],
        include_dirs=["csrc", get_include()],
        define_macros=macros,
        extra_compile_args=FLAGS + threads,
        extra_link_args=threads,
        language="c++",
    )


class BuildNative(build_ext):
    """Compile each source with its own flags, several at a time, and only what is out of date."""

    def run(self) -> None:
        nvcc = decide_cuda(native=True)
        super().run()
        library = Path(self.get_ext_fullpath("pymerge._C")).with_name("_cuda.so")
        if nvcc is not None:
            self.build_cuda(nvcc, library)
        else:
            library.unlink(missing_ok=True)  # one of an earlier build in place

    def build_cuda(self, nvcc: str, library: Path) -> None:
        """Compile and link the CUDA library, which knows neither Python nor torch."""
        module = cuda_module()
        folder = Path("build") / f"cuda-{sysconfig.get_platform()}"
        try:
            module.build(library, folder, jobs=build_jobs(self.parallel), nvcc=nvcc)
        except (module.BuildError, OSError) as error:
            stop(f"building the CUDA library failed: {error}\n\nPYMERGE_CUDA=0 leaves it out.")

    def build_extension(self, ext: Extension) -> None:
        ext.define_macros.append(("PYMERGE_VERSION", f'"{self.distribution.get_version()}"'))
        headers = [
            Path(sysconfig.get_path(kind), "Python.h") for kind in ("include", "platinclude")
        ]
        if not any(header.is_file() for header in headers):
            stop(f"{headers[0]} is missing\n\n{NEEDS}")
        try:
            objects = self.compile_objects(ext)
            ext.sources, ext.extra_objects, ext.depends = [], objects, objects
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            stop(f"building the native part failed: {error}\n\n{NEEDS}")

    def compile_objects(self, ext: Extension) -> list[str]:
        """Compile what changed and return the object files of all sources."""
        folder = self.object_folder()
        stale_before = self.newest_input(ext, folder)
        objects, stale = [], []
        for source in ext.sources:
            (target,) = self.compiler.object_filenames([source], output_dir=str(folder))
            objects.append(target)
            # Made here because distutils' mkpath is not safe in several threads.
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            if not is_newer(target, max(stale_before, os.path.getmtime(source))):
                stale.append(source)
        jobs = build_jobs(self.parallel)
        print(f"pymerge: {len(stale)} of {len(objects)} files to compile, {jobs} at a time")
        with ThreadPoolExecutor(jobs) as pool:
            running = [pool.submit(self.compile_one, ext, source, folder) for source in stale]
            wait(running, return_when=FIRST_EXCEPTION)
            for job in running:
                job.cancel()
        for job in running:
            if not job.cancelled():
                job.result()
        return objects

    def compile_one(self, ext: Extension, source: str, folder: Path) -> None:
        """Compile one source."""
        self.compiler.compile(
            [source],
            output_dir=str(folder),
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=[*ext.extra_compile_args, *isa_flags(source)],
        )

    def object_folder(self) -> Path:
        """Return where object files stay between builds.

        Editable builds get a temporary build directory, so nothing kept there would be found again.
        """
        tag = sys.implementation.cache_tag
        return Path("build") / f"native-{sysconfig.get_platform()}-{tag}"

    def newest_input(self, ext: Extension, folder: Path) -> float:
        """Return the time of the newest thing that every object depends on."""
        import pybind11

        settings = {
            "compiler": self.compiler.compiler_so,
            "compiler_cxx": getattr(self.compiler, "compiler_so_cxx", None),
            "flags": [ext.extra_compile_args, ISA_FLAGS, ext.define_macros],
            "pybind11": pybind11.__version__,
            "python": sys.version,
        }
        written = json.dumps(settings, indent=1, sort_keys=True)
        record = folder / "settings.json"
        if not record.is_file() or record.read_text() != written:
            folder.mkdir(parents=True, exist_ok=True)
            record.write_text(written)
        inputs = [record, *CSRC.rglob("*.h"), *CSRC.rglob("*.def")]
        return max(path.stat().st_mtime for path in inputs)


def is_newer(target: str, time: float) -> bool:
    """Return whether a file exists and was written after the given time."""
    return os.path.isfile(target) and os.path.getmtime(target) > time


def build_jobs(asked: int | bool | None) -> int:
    """Return how many compilers to run at a time."""
    named = os.environ.get("PYMERGE_BUILD_JOBS")
    if named:
        if not named.isdigit() or int(named) < 1:
            stop(f"PYMERGE_BUILD_JOBS is {named!r}, expected a whole number from 1 on")
        return int(named)
    if asked and asked is not True:
        return asked
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


NATIVE = choice("PYMERGE_NATIVE", "1", ("0", "1")) == "1"
if not NATIVE:
    decide_cuda(native=False)

setup(
    packages=[*find_packages(include=["pymerge", "pymerge.*"]), "pymerge.triton_kernels"],
    # Installed at top level, `triton_kernels` would shadow another project's package.
    package_dir={"pymerge": "pymerge", "pymerge.triton_kernels": "triton_kernels"},
    package_data={
        "": ["*.pyi"],
        "pymerge": ["py.typed"],
        "pymerge.analysis": ["assets/*.css", "assets/*.js"],
    },
    ext_modules=[native_extension()] if NATIVE else [],
    cmdclass={"build_ext": BuildNative},
)
