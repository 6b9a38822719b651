"""Records of the methods that torch computes on whole matrices: singular vectors and the like."""

from __future__ import annotations

from functools import partial

from pymerge.methods.parameters import NAN
from pymerge.methods.spec import MethodSpec, Parameter

__all__ = ["RECORDS"]

_matrix_method = partial(
    MethodSpec,
    run="pymerge.methods.matrices.passes:run",
    needs_base=True,
    backends=("reference",),
    torch_because="singular vectors of whole matrices, by torch.linalg",
)

TSV_M = _matrix_method(
    name="tsv_m",
    title="TSV-M (task singular vectors)",
    summary="Keeps the leading singular vectors of each task's matrices, made orthogonal.",
    formula=(
        "tau_k = U_k S_k V_k; keep 1/K of the rank; theta = theta_0 + scale * orth(U) S orth(V); "
        "other shapes: the mean of tau_k"
    ),
    source="Gargiulo et al., Task Singular Vectors, 2025",
    url="https://arxiv.org/abs/2412.00081",
    parameters=(
        Parameter("scale", "float", 1.0, "Scaling coefficient.", names=("lambda", "scale")),
        NAN,
    ),
)

RECORDS = (TSV_M,)
