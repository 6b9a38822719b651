"""docs/adding-a-method.md: its files and blocks are those of the project, and a method that is
added by its text works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "docs" / "adding-a-method.md"
# A file, and what was written into it.
BLOCK = re.compile(r"^`([^`\n]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(RECIPE.read_text(encoding="utf-8"))
NEW = "midmost"  # what the median is called where it is added once more

CHECK = f"""
import numpy as np, torch, yaml, pymerge
from pathlib import Path
from pymerge.commands.main import main
from tests import models
from tests.case import make_inputs
from tests.cases import CASES

assert Path(pymerge.__file__).is_relative_to(Path.cwd()), pymerge.__file__
spec = pymerge.methods()["{NEW}"]
assert spec.function_name == "{NEW}" and not spec.needs_base
base, tuned = models.llama(3, torch.float32)
for origin in (None, base):
    ours = pymerge.{NEW}(tuned, base=origin, scale=0.5, backend="reference")
    theirs = pymerge.median(tuned, base=origin, scale=0.5, backend="reference")
    assert all(torch.equal(ours[name], theirs[name]) for name in base)
rows = [case for case in CASES if case.name.startswith("{NEW}")]
assert len(rows) == 2
for row in rows:
    inputs = make_inputs(1000, 4, [torch.float64])
    found = row.run(inputs, torch.float64, "reference", wide=True)["out"].numpy()
    expected = row.oracle(inputs[0].numpy(), torch.stack(inputs[1]).numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-12)
models.save_family(Path("family"), base, tuned, files=2)
config = models.config(Path("family"), "{NEW}", 3)
Path("config.yml").write_text(yaml.safe_dump(config))
assert main(["methods", "{NEW}"]) == 0
assert main(["merge", "config.yml", "out", "--backend", "reference"]) == 0
"""

TRITON = f"""
import torch, pymerge
tuned = [torch.randn(300, generator=torch.Generator().manual_seed(k)) for k in range(4)]
found = pymerge.{NEW}(tuned, backend="triton")
assert torch.equal(found, pymerge.{NEW}(tuned, backend="reference"))
"""


def renamed(block: str) -> str:
    """Return a block with the median under another name, but for numpy's."""
    block = re.sub(r"(?<!np\.)median", NEW, block)
    return block.replace("Median", NEW.title()).replace("MEDIAN", NEW.upper())


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources in which every block stands twice, once with another name."""
    root = tmp_path_factory.mktemp("recipe")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for folder in ("pymerge", "csrc", "tests", "triton_kernels"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    kernels = root / "pymerge" / "triton_kernels"
    if not kernels.exists():  # where it stands once it is installed
        kernels.symlink_to(root / "triton_kernels")
    for name, block in BLOCKS:
        path = root / name
        text = path.read_text(encoding="utf-8")
        path.write_text(
            text.replace(block, block + "\n" * (block.count("\n") > 8) + renamed(block))
        )
    return root


def run(root: Path, code: str, **environment: str) -> None:
    """Run code in a process that sees the copy, not the project."""
    own = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=own, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_recipe_has_all_rooms() -> None:
    assert {Path(name).parts[0] for name, _ in BLOCKS} == {
        "csrc",
        "pymerge",
        "tests",
        "triton_kernels",
    }
    assert len({name for name, _ in BLOCKS}) == 7


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_the_recipe_is_what_the_files_say(name: str, block: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8").count(block) == 1


def test_the_recipe_names_files_that_are_there() -> None:
    text = RECIPE.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./-]+(?:/[\w.-]+|\.md))`", text)) - {"0.5"}
    families = ROOT / "pymerge" / "methods"
    missing = [
        name for name in named if not (ROOT / name).exists() and not (families / name).exists()
    ]
    assert len(named) > 10
    assert missing == []


def test_a_method_added_by_the_recipe_works(added: Path) -> None:
    run(added, CHECK)


def test_a_kernel_added_by_the_recipe_runs_in_triton(added: Path) -> None:
    pytest.importorskip("triton")
    run(added, TRITON, TRITON_INTERPRET="1")


def test_a_kernel_added_by_the_recipe_compiles(added: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++")) or pytest.skip("no C++ compiler")
    code = (
        '#define PM_VECTOR_BYTES 16\n#include "cpu/all_kernels.h"\n'
        'static_assert(pymerge::pointwise_reals(pymerge::Pointwise::kMidmost, 5) == 2, "");\n'
    )
    (added / "check.cpp").write_text(code)
    flags = ["-std=c++17", "-fsyntax-only", "-DPYMERGE_ABI=1", "-Icsrc"]
    done = subprocess.run(
        [str(compiler), *flags, "check.cpp"], cwd=added, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
