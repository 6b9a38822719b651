"""Records of the methods that torch computes on whole matrices: singular vectors and the like."""

from __future__ import annotations

from functools import partial

from pymerge.methods.parameters import NAN, SCALE
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
        SCALE,
        NAN,
    ),
)

_iso = partial(
    _matrix_method,
    source="Marczak et al., No Task Left Behind: Isotropic Model Merging, 2025",
    url="https://arxiv.org/abs/2502.04959",
)

ISO_C = _iso(
    name="iso_c",
    title="Iso-C (isotropic merging in the common subspace)",
    summary="Adds up the task vectors of each matrix, and makes all singular values equal.",
    formula=(
        "U S V = sum_k tau_k; theta = theta_0 + scale * mean(S) U V; other shapes: the mean of "
        "tau_k"
    ),
    parameters=(SCALE, NAN),
)

ISO_CTS = _iso(
    name="iso_cts",
    title="Iso-CTS (isotropic merging in common and task-specific subspaces)",
    summary="Iso-C, with the weakest common directions replaced by each task's strongest others.",
    formula=(
        "U S V = sum_k tau_k, its first common_fraction of the rank kept; of tau_k - U U^T tau_k "
        "an equal share of the rest; theta = theta_0 + scale * mean(S) orth(U) orth(V)"
    ),
    parameters=(
        SCALE,
        Parameter(
            "common_fraction",
            "float",
            0.8,
            "Share of the rank that the common subspace keeps; 1 gives iso_c.",
            minimum=0.0,
            maximum=1.0,
            names=("common_fraction", "common_space_fraction"),
        ),
        NAN,
    ),
)

RECORDS = (TSV_M, ISO_C, ISO_CTS)
