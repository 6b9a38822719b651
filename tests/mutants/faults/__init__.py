"""The list of mutants, area by area."""

from __future__ import annotations

from tests.mutants.faults import engine, features, inputs, methods, output, surface

__all__ = ["MUTANTS"]

MUTANTS = (
    *engine.MUTANTS,
    *methods.MUTANTS,
    *inputs.MUTANTS,
    *output.MUTANTS,
    *features.MUTANTS,
    *surface.MUTANTS,
)
