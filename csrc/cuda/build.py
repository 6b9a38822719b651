"""Build the CUDA library: a plain shared object that needs neither Python nor torch.

setup.py uses this; it also runs by itself:

    python csrc/cuda/build.py OUTPUT [--archs 90] [--folder OBJECTS] [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent
ARCHS = "80;90;100;120+PTX"

FLAGS = [
    "-std=c++17",
    "-O3",
    # One config gives the same bytes everywhere: no fused multiply-add that is not written down,
    # exact division, subnormals.
    "-fmad=false",
    "-prec-div=true",
    "-prec-sqrt=true",
    "-ftz=false",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
    # GCC's unroll pragmas are for the CPU's kernels.
    "-diag-suppress=1675",
    # The parameters of every kernel are 32 KB of zeros in its image.
    "-Xfatbin=-compress-all",
    # Registers and spills of every kernel, for the tests.
    "-Xptxas=-v",
    f"-DPYMERGE_ABI={runpy.run_path(str(CSRC / 'abi.py'))['abi']()}",
    f"-I{CSRC}",
]

# Sources that are compiled once for each dtype: they take longest.
OF_DTYPES = ("ties", "pointwise", "sparse")
DTYPES = {"bf16": "Bf16", "f16": "F16", "f32": "F32"}


class Unit(NamedTuple):
    """What one call of the compiler makes an object of."""

    name: str
    source: Path
    definitions: tuple[str, ...] = ()


def units() -> list[Unit]:
    """Return all units of the library, those that take longest first."""
    sources = {source.stem: source for source in sorted(HERE.glob("*.cu"))}
    of_dtypes = [
        Unit(f"{stem}_{name}", sources[stem], (f"-DPYMERGE_DTYPE={dtype}",))
        for stem in OF_DTYPES
        for name, dtype in DTYPES.items()
    ]
    others = [Unit(stem, path) for stem, path in sources.items() if stem not in OF_DTYPES]
    return [*of_dtypes, *others]


class BuildError(Exception):
    """The library could not be built; the message says why."""


def find_nvcc() -> str | None:
    """Return the compiler: NVCC, the one on PATH, or the one of CUDA_HOME or /usr/local/cuda."""
    named = os.environ.get("NVCC")
    if named:
        return shutil.which(named)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [shutil.which("nvcc"), *(shutil.which(f"{home}/bin/nvcc") for home in homes if home)]
    return next((place for place in places if place), None)


def _output(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout


def default_archs(nvcc: str) -> str:
    """Return those of ARCHS that the compiler knows, with PTX of the newest."""
    known = set(re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch")))
    numbers = [arch for arch in re.findall(r"\d+", ARCHS) if arch in known]
    if not numbers:
        raise BuildError(f"{nvcc} knows none of the architectures {ARCHS}")
    return ";".join(numbers) + "+PTX"


def gencode(archs: str) -> list[str]:
    """Return the flags of a list of architectures such as "80;90+PTX"."""
    flags = []
    for name in archs.split(";"):
        match = re.fullmatch(r"(\d+[a-z]?)(\+PTX)?", name.strip())
        if match is None:
            raise BuildError(
                f"PYMERGE_CUDA_ARCHS is {archs!r}, expected numbers of architectures, 80 or more, "
                f"separated by semicolons, each with or without +PTX, such as {ARCHS!r}"
            )
        number, ptx = match.groups()
        if int(number.rstrip("abcdefghijklmnopqrstuvwxyz")) < 80:
            raise BuildError(f"PYMERGE_CUDA_ARCHS is {archs!r}: the kernels need 80 or more")
        code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def build(
    output: Path, folder: Path, archs: str | None = None, jobs: int = 1, nvcc: str | None = None
) -> list[Path]:
    """Compile what is out of date, link, and return the compiler's logs, one for each source.

    Args:
        output: the shared object.
        folder: where object files and logs stay between builds.
        archs: like ARCHS; None takes PYMERGE_CUDA_ARCHS, else what the compiler knows of ARCHS.
        jobs: compilers at a time.
        nvcc: the compiler; None looks for it.
    """
    nvcc = nvcc or find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc was not found: set NVCC or put it on PATH")
    archs = archs or os.environ.get("PYMERGE_CUDA_ARCHS") or default_archs(nvcc)
    flags = [*FLAGS, *gencode(archs)]
    folder.mkdir(parents=True, exist_ok=True)
    inputs = [_settings(folder, [nvcc, _output(nvcc, "--version"), *flags])]
    inputs += [*CSRC.glob("*.def"), *CSRC.glob("*.h"), *CSRC.glob("math/*.h"), *HERE.glob("*.h")]
    newest = max(path.stat().st_mtime for path in inputs)
    objects = {unit: folder / f"{unit.name}.o" for unit in units()}
    stale = [
        unit
        for unit, target in objects.items()
        if not _is_newer(target, max(newest, unit.source.stat().st_mtime))
    ]
    print(f"pymerge: CUDA for {archs}: {len(stale)} of {len(objects)} files to compile", flush=True)

    def compile_one(unit: Unit) -> None:
        target = objects[unit]
        command = [nvcc, *flags, *unit.definitions, "-c", str(unit.source), "-o", str(target)]
        target.unlink(missing_ok=True)
        target.with_suffix(".log").write_text(_output(*command))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, stale))
    if stale or not output.is_file():
        _link(nvcc, gencode(archs), list(objects.values()), output)
    return [target.with_suffix(".log") for target in objects.values()]


def _link(nvcc: str, flags: Sequence[str], objects: Sequence[Path], output: Path) -> None:
    # nvcc finds the runtime by itself, also where it is only a wrapper in another folder.
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.with_name(f".{output.name}.{os.getpid()}")
    # A function that no source defines is an error here, not where the library is loaded.
    rules = f"-Xlinker=--no-undefined,--version-script={HERE / 'exports.map'}"
    shared = [nvcc, "-shared", "-cudart=static", *flags, rules]
    _output(*shared, *map(str, objects), "-o", str(fresh))
    fresh.replace(output)


def _settings(folder: Path, settings: list[str]) -> Path:
    """Return a file that is rewritten whenever the compiler or its flags change."""
    record = folder / "settings.json"
    written = json.dumps(settings, indent=1)
    if not record.is_file() or record.read_text() != written:
        record.write_text(written)
    return record


def _is_newer(target: Path, time: float) -> bool:
    # Not older: a compiler may be done within one tick of the clock of the file system.
    return target.is_file() and target.stat().st_mtime >= time


def main() -> None:
    parser = argparse.ArgumentParser(description="Build pymerge's CUDA library.")
    parser.add_argument("output", type=Path, help="the shared object")
    parser.add_argument("--archs", help=f"architectures; the default is {ARCHS}")
    parser.add_argument("--folder", type=Path, default=Path("build/cuda"), help="of object files")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time")
    asked = parser.parse_args()
    try:
        build(asked.output, asked.folder, asked.archs, asked.jobs)
    except BuildError as error:
        sys.exit(f"pymerge: {error}")


if __name__ == "__main__":
    main()
