"""The rules that keep the layout: who imports whom, who knows a method's name, what needs torch."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pymerge
from pymerge.methods import METHODS

PACKAGE = Path(pymerge.__file__).parent

# From top to bottom: a room imports rooms of lower floors only; those of one floor do not import
# each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("commands",),
    ("search",),
    ("analysis", "adamerging"),
    ("adapters", "statistics", "primitives"),
    ("merging",),
    ("plan",),
    ("config",),
    ("methods",),
    ("checkpoint",),
    ("output",),
    ("engine",),
    ("ops",),
    ("memory",),
    ("byte_sizes", "dtypes", "entry", "hashing", "lazy", "strict_json"),
    ("errors", "_version", "_C"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# (module, what it imports): why it may look up.
EXCEPTIONS: dict[tuple[str, str], str] = {
    (f"pymerge.methods.{family.name}.functions", "pymerge.merging.functions"): (
        "public functions stand beside the records whose signatures they are"
    )
    for family in (PACKAGE / "methods").iterdir()
    if (family / "functions.py").is_file()
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if "triton_kernels" in path.parts:
            continue
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts).removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the modules of pymerge that a module imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("pymerge."))
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports are absolute"
            if node.module == "pymerge":
                yield from (f"pymerge.{alias.name}" for alias in node.names)
            elif node.module.startswith("pymerge."):
                yield node.module


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_a_floor() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert rooms - {"__init__", "__main__", "__pycache__", "triton_kernels"} <= set(FLOOR)


def test_imports_run_downwards() -> None:
    wrong = []
    for module, tree in modules():
        if module in ("pymerge", "pymerge.__main__"):
            continue
        for target in imported(tree):
            name = room(target)
            public = name not in FLOOR and name in pymerge.__all__
            floor = FLOOR["merging"] if public else FLOOR[name]
            if room(module) == name or FLOOR[room(module)] < floor:
                continue
            if (module, target) not in EXCEPTIONS:
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_exceptions_are_needed() -> None:
    found = {(module, target) for module, tree in modules() for target in imported(tree)}
    assert set(EXCEPTIONS) <= found


def at_import(tree: ast.Module) -> ast.Module:
    """Return the part of a module that runs when it is imported."""

    class Pruned(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            checks = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return None if checks else self.generic_visit(node)

    return Pruned().visit(tree)


def test_imports_have_no_circles() -> None:
    """No circle between modules, within a room or without."""
    graph = {module: set(imported(at_import(tree))) for module, tree in modules()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for target in sorted(graph.get(module, ())):
            visit(target, (*path, module))
        done.add(module)

    for module in sorted(graph):
        if module != "pymerge":
            visit(module, ())


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_methods_are_compared_by_name_in_their_family_alone() -> None:
    """What differs between methods is a fact of the record."""
    wrong = []
    for module, tree in modules():
        if module.startswith(("pymerge.methods.", "pymerge.ops.")):  # ops have kinds of their own
            continue
        for node in ast.walk(tree):
            compared: list[ast.expr] = []
            if isinstance(node, ast.Compare):
                compared = [node.left, *node.comparators]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in ("startswith", "endswith", "removeprefix", "removesuffix"):
                    compared = list(node.args)
            elif isinstance(node, ast.match_case):
                compared = [n.value for n in ast.walk(node) if isinstance(n, ast.MatchValue)]
            for part in compared:
                wrong += [
                    f"{module}:{line}: {value!r}"
                    for line, value in strings(part)
                    if value in METHODS and (module, value) not in NO_METHODS
                ]
    assert not wrong, "\n".join(wrong)


def test_words_that_are_no_methods_are_there() -> None:
    found = {(module, value) for module, tree in modules() for _, value in strings(tree)}
    assert set(NO_METHODS) <= found


# Words that are names of methods, too, and mean something else there.
NO_METHODS = {
    ("pymerge.checkpoint.peft.adapted", "linear"): "a kind of layer",
    ("pymerge.checkpoint.peft.build", "linear"): "a kind of layer",
    ("pymerge.checkpoint.statistics", "fisher"): "a kind of statistics",
    ("pymerge.statistics.files", "fisher"): "a kind of statistics",
    ("pymerge.statistics.run", "fisher"): "a kind of statistics",
    ("pymerge.search.space", "linear"): "a scale of values",
}


@pytest.mark.parametrize(
    "module",
    ["pymerge", "pymerge.methods", "pymerge.config", "pymerge.commands.main"],
)
def test_records_config_and_commands_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_native_marshalling_needs_no_torch() -> None:
    code = (
        "import importlib, pkgutil, sys, pymerge.ops.native as native\n"
        "for found in pkgutil.iter_modules(native.__path__, 'pymerge.ops.native.'):\n"
        "    importlib.import_module(found.name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_record_can_run() -> None:
    for spec in METHODS.values():
        assert callable(spec.runner()), spec.name


def test_every_method_has_a_function() -> None:
    for spec in METHODS.values():
        assert not spec.callable or spec.function_name in pymerge.__all__, spec.name
    assert [spec.name for spec in METHODS.values() if not spec.callable] == ["adamerging"]


def test_a_family_exports_its_functions() -> None:
    """The stub takes all of them: what it takes is what the records name."""
    stub = (PACKAGE / "__init__.pyi").read_text(encoding="utf-8")
    for module in {spec.functions for spec in METHODS.values() if spec.callable}:
        assert f"from {module} import *\n" in stub
        own = {s.function_name for s in METHODS.values() if s.callable and s.functions == module}
        assert set(importlib.import_module(module).__all__) == own


def test_the_readme_names_every_method() -> None:
    text = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"`{name}`" not in text] == []


def test_documents_name_files_that_are_there() -> None:
    """Those with a folder, and those of any folder without one."""
    root = PACKAGE.parent
    paths = {
        path.relative_to(root).as_posix()
        for folder in ("pymerge", "csrc", "triton_kernels", "tests", "benchmarks", "docs")
        for path in (root / folder).rglob("*")
        if "__pycache__" not in path.parts
    } | {path.name for path in root.iterdir()}
    ends = {part for path in paths for part in (path, path.rpartition("/")[2])}
    missing = []
    for document in (*root.glob("*.md"), *(root / "docs").glob("*.md")):
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"`([\w./-]+\.(?:py|h|cpp|cu|def|pyi))`", text):
            if name not in ends and not any(path.endswith(f"/{name}") for path in paths):
                missing.append(f"{document.name}: {name}")
    assert missing == []
