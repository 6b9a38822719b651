"""Faults in the command line and the functions of the package."""

from __future__ import annotations

from tests.mutants.mutant import mutant

__all__ = ["MUTANTS"]

MUTANTS = (
    mutant(
        "options refuse their least numbers",
        "pymerge/commands/options.py",
        "if not least <= value < 2**63:",
        "if not least < value < 2**63:",
        "tests/test_cli.py::test_options_take_their_least_numbers",
    ),
    mutant(
        "learning goes on only with --restart",
        "pymerge/commands/ada.py",
        "        resume=not options.restart,",
        "        resume=options.restart,",
        "tests/test_cli.py",
        "tests/test_adamerging_command.py",
    ),
    mutant(
        "SIGTERM is handled after the command too",
        "pymerge/commands/main.py",
        "        signal.signal(signal.SIGTERM, before)",
        "        pass",
        "tests/test_cli.py",
    ),
    mutant(
        "an interruption is a bad request",
        "pymerge/commands/main.py",
        'return _failed("interrupted", 130)',
        'return _failed("interrupted", 2)',
        "tests/test_cli.py",
    ),
    mutant(
        "tensors that one model unties stay tied",
        "pymerge/merging/structures.py",
        "        if all(\n            other[name].data_ptr()",
        "        if any(\n            other[name].data_ptr()",
        "tests/test_api.py",
    ),
    mutant(
        "long lists are sorted as words",
        "pymerge/merging/structures.py",
        'items = {f"{index:012d}": tensor',
        'items = {f"{index}": tensor',
        "tests/test_api.py",
    ),
    mutant(
        "a result of float64 is computed in float32",
        "pymerge/merging/api.py",
        "wide = dtype == torch.float64 or any(",
        "wide = any(",
        "tests/test_api.py",
    ),
    mutant(
        "a task vector is applied to another base as to its own",
        "pymerge/merging/task_vector.py",
        "        if all(term.base.same_as(target) for term in self._terms):\n            merged",
        "        if any(term.base.same_as(target) for term in self._terms):\n            merged",
        "tests/test_task_vector.py",
    ),
    mutant(
        "a sum of task vectors takes the last one's coefficient away",
        "pymerge/merging/task_vector.py",
        "sides.append((term.base, -scale * term.coefficient))",
        "sides.append((term.base, -scale))",
        "tests/test_task_vector.py",
    ),
    mutant(
        "an error of an entry point hides a missing file",
        "pymerge/entry.py",
        "    except OSError:\n        raise\n",
        "",
        "tests/test_adamerging_command.py",
        "tests/test_collect_command_bad.py",
    ),
    mutant(
        "the last directory of a path counts as a parent of the machine",
        "pymerge/merging/card.py",
        "return Path(path).name if Path(path).is_absolute() else path",
        "return Path(path).name",
        "tests/test_cli.py",
        "tests/test_engine_output.py",
    ),
    mutant(
        "a backend that was named may be replaced where it refuses",
        "pymerge/ops/runner.py",
        'if self.backend != "auto" or name in refused or not takes_fewer_models(error):',
        "if name in refused or not takes_fewer_models(error):",
        "tests/test_runner.py",
        known="a backend that was named is chosen again, and its second refusal is raised",
    ),
    mutant(
        "slices end beyond the array",
        "pymerge/ops/array.py",
        "max(0, stop - start))",
        "stop - start)",
        "tests/test_array.py",
    ),
    mutant(
        "a warning about the reference is lost",
        "pymerge/merging/gpu/place.py",
        'warning = f"computed with the slow reference backend: {lacks}"\n',
        'warning = ""\n',
        "tests/test_data_files.py::test_files_and_tensors_give_the_same_bytes",
    ),
)
