"""What a merge method is called, takes, and comes from: the record that every layer reads."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pymerge.engine.steps import MERGE, Step, whole_model
from pymerge.errors import RequestError, nearest

__all__ = ["REQUIRED", "MethodSpec", "Parameter"]


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    `scope` is "model" for one value per fine-tuned model, "method" for one value per merge. Both
    kinds may differ between tensors in a YAML config (`filter` lists) unless `per_tensor` is False.
    `names` are the spellings that a YAML config may use; the first is the one that documents show.
    `no_effect` marks a parameter that other tools have and that is accepted, with a warning, for
    compatibility only. `only` is the one value that is taken so far of a parameter that other tools
    have. A parameter of kind "path" names a file of statistics in a config; functions take the
    statistics themselves.
    """

    name: str
    kind: Literal["float", "int", "bool", "str", "path"]
    default: Any
    doc: str
    scope: Literal["model", "method"] = "method"
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] | None = None
    names: tuple[str, ...] = ()
    per_tensor: bool = True
    no_effect: bool = False
    only: Any = None
    default_doc: str = ""
    # What true and false stand for, where another tool has a switch and we have names.
    booleans: tuple[str, str] | None = None

    @property
    def yaml_names(self) -> tuple[str, ...]:
        return self.names or (self.name,)

    @property
    def expected(self) -> str:
        """What a value must be, in words: `a number in [0, 1]`, `one of 'mean', 'sum', 'max'`."""
        if self.only is not None:
            return f"{str(self.only).lower()} (nothing else is supported yet)"
        if self.choices is not None:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        words = {
            "float": "a finite number",
            "int": "an integer",
            "bool": "true or false",
            "str": "a string",
            "path": "the path of a file that save_statistics wrote",
        }
        text = words[self.kind]
        if self.minimum is not None and self.maximum is not None:
            return f"{text} in [{self.minimum:g}, {self.maximum:g}]"
        if self.minimum is not None:
            return f"{text} >= {self.minimum:g}"
        if self.maximum is not None:
            return f"{text} <= {self.maximum:g}"
        return text

    def check(self, value: Any, where: str) -> Any:
        """Return the value in its Python type, or raise RequestError.

        `where` names the argument as the user wrote it, e.g. `ties_merge: density` or
        `config.yml:7: models[0].parameters.density`.
        """
        bad = RequestError(f"{where}: expected {self.expected}, got {value!r}")
        if self.kind == "bool":
            if not isinstance(value, bool) or (self.only is not None and value != self.only):
                raise bad
            return value
        if self.kind == "path":
            if not isinstance(value, str) or not value.strip() or "\0" in value:
                raise bad
            return value
        if self.kind == "str":
            if isinstance(value, bool) and self.booleans is not None:
                value = self.booleans[0] if value else self.booleans[1]
            if not isinstance(value, str):
                raise bad
            if self.choices is not None and value not in self.choices:
                raise RequestError(str(bad) + nearest(value, self.choices))
            return value
        if not isinstance(value, (bool, int, float)) and hasattr(value, "item"):
            # numbers of numpy and tensors of one element are numbers too
            try:
                value = value.item()
            except (ValueError, RuntimeError):
                raise bad from None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise bad
        if self.kind == "int":
            if isinstance(value, float):
                if not value.is_integer():
                    raise bad
                value = int(value)
        else:
            try:
                value = float(value)
            except OverflowError:
                raise bad from None
            if not math.isfinite(value):
                raise bad
        if self.minimum is not None and value < self.minimum:
            raise bad
        if self.maximum is not None and value > self.maximum:
            raise bad
        return value


Parameters = Mapping[str, Any]  # resolved, by `Parameter.name`; those of scope "model" are lists


def never(_parameters: Parameters) -> bool:
    return False


def always(_parameters: Parameters) -> bool:
    return True


def reads_once(_parameters: Parameters, _numel: int, _total: int) -> tuple[Step, ...]:
    return (MERGE,)


@dataclass(frozen=True)
class MethodSpec:
    """The record of one merge method: it answers every question about the method.

    Nothing outside a method's family compares its name. Configs, the plan, the engine, the
    functions, `pymerge methods` and the model card read these facts.

    Attributes:
        name: as in YAML. title, summary, formula, source, url: for people.
        run: "module:function" of what runs it, (works, source, sink, context) -> counts or None;
            imported when it is needed.
        parameters: what it takes.
        needs_base: it needs a base. takes_base: it works on task vectors where a base is given,
            else on the models.
        min_models, max_models: how many models it takes beside the base.
        passes: how often it reads its inputs, in words, for people. `reads` says it exactly.
        function: the public function's name in `pymerge`; "" for the method's own, None where
            there is none.
        reads: (parameters, elements of a tensor, elements of the model) -> the steps of a merge,
            the merge itself last. The plan's text and bytes, and what may be merged again by
            itself, follow from it.
        one_op: all that is done with a tensor is one op that needs no other, so that a GPU may
            gather those of many tensors.
        divides: the switch that divides by the plain sum of the weights, which then must not be 0.
        check: says what of resolved parameters does not fit together.
        spans_model: whether one trim spans all tensors, given the global values of `semantics` and
            `scope`: its density is one number then.
        backends: those that have kernels for it.
        torch_because: why only the reference computes it, where that is so.
        torch_only: the semantics that only the reference computes, whatever backends the others
            have.
        for_tensor: turns resolved parameters into those of one tensor, by its name.
        statistics: what is collected from data beside the models: "fisher" (diagonals) or "gram".
        implied: (name of a parameter that is not set and has no default, the other parameters'
            values by name) -> the value that it has then.
        searches: settings of published searches of its coefficients, by the name of the preset
            (docs/search.md).
        yaml_defaults: defaults in mergekit's YAML language that differ from the function's.
        details: what its own family wants to know of it; nobody else looks at it.
    """

    name: str
    title: str
    summary: str
    formula: str
    source: str
    url: str
    run: str
    parameters: tuple[Parameter, ...]
    needs_base: bool
    takes_base: bool = False
    min_models: int = 1
    max_models: int | None = None
    passes: str = "1"
    function: str | None = ""
    reads: Callable[[Parameters, int, int], tuple[Step, ...]] = reads_once
    one_op: Callable[[Parameters], bool] = never
    divides: str | None = None
    check: Callable[[Parameters], list[str]] | None = None
    spans_model: Callable[[Parameters], bool] = never
    backends: tuple[str, ...] = ("reference", "cpu", "cuda", "triton")
    torch_because: str = ""
    torch_only: str | None = None
    for_tensor: Callable[[Parameters, str], dict[str, Any]] | None = None
    statistics: Literal["fisher", "gram"] | None = None
    implied: Callable[[str, Callable[[str], Any]], Any] | None = None
    searches: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    yaml_defaults: Mapping[str, Any] = field(default_factory=dict)
    details: Any = None

    def runner(self) -> Callable[..., Mapping[str, int] | None]:
        """Return the function that runs the method."""
        module, _, name = self.run.partition(":")
        return getattr(importlib.import_module(module), name)

    @property
    def callable(self) -> bool:
        """Whether it has a public function."""
        return self.function is not None

    @property
    def function_name(self) -> str:
        """The name of its public function."""
        return self.function or self.name

    @property
    def functions(self) -> str:
        """The module that has its public function: `functions` beside what runs it."""
        return self.run.partition(":")[0].rpartition(".")[0] + ".functions"

    def steps(self, parameters: Parameters, numel: int, total: int) -> tuple[Step, ...]:
        """Return what is read for a tensor; without parameters it is copied."""
        return self.reads(parameters, numel, total) if parameters else (MERGE,)

    def gathers(self, parameters: Parameters) -> bool:
        """Return whether all that is done with a tensor is one op, which needs no other."""
        return self.one_op(parameters)

    def alone(self, parameters: Parameters, numel: int, total: int) -> bool:
        """Return whether a tensor of the result depends on nothing but its own inputs and
        parameters."""
        return not whole_model(self.steps(parameters, numel, total))

    def cancelling(self, parameters: Mapping[str, Any]) -> list[float] | None:
        """Return the weights if they sum to 0 and are divided by, else None."""
        if self.divides is None or not parameters.get(self.divides):
            return None
        weights = [float(weight) for weight in parameters["weight"]]
        return weights if abs(sum(weights)) < 1e-8 else None

    def in_dialect(self, semantics: str | None) -> MethodSpec:
        """Return the record for messages and backends of one dialect."""
        if semantics is None or semantics != self.torch_only:
            return self
        name = f"{self.name} with semantics {semantics!r}"
        return replace(self, name=name, backends=("reference",))

    def with_base(self, given: bool) -> bool:
        """Return whether the base takes part, if one is given or not."""
        return self.needs_base or (self.takes_base and given)

    def parameter(self, name: str) -> Parameter | None:
        """Return the parameter of that name or YAML spelling, or None."""
        for parameter in self.parameters:
            if name == parameter.name or name in parameter.yaml_names:
                return parameter
        return None

    @property
    def spellings(self) -> list[str]:
        """Every parameter name that a YAML config may use."""
        return [name for parameter in self.parameters for name in parameter.yaml_names]
