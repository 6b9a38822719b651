"""TIES: golden vectors of the published codes, independent re-implementations, and where dialects
differ."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

import pymerge
from pymerge.engine.trim import TrimTarget
from pymerge.methods.ties.record import SEMANTICS, ties_rule, trim_target
from tests import oracles
from tests.conftest import BACKEND_IDS

# Three task vectors whose values and results were computed by running the published codes.
GOLDEN = torch.tensor(
    [
        [0.9, -0.1, 0.4, 0.0, 0.3, -0.7, 0.2, 0.05, -0.6, 0.25],
        [-0.2, -0.5, 0.4, 0.15, -0.3, 0.1, 0.8, -0.05, 0.6, 0.35],
        [0.3, 0.2, -0.8, -0.15, 0.0, -0.2, -0.1, 0.55, 0.45, -0.6],
    ]
)
K20 = [0.9, -0.5, -0.8, 0, 0, -0.7, 0.8, 0.55, -0.6, -0.6]
K30 = [0.9, -0.5, 0.4, 0, 0, -0.7, 0.8, 0.55, 0.525, -0.6]
K50 = [0.6, -0.5, 0.4, 0, 0.3, -0.45, 0.8, 0.55, 0.525, 0.3]
M50 = [0.6, -0.5, 0.4, 0, 0.3, -0.7, 0.8, 0.55, 0.525, -0.6]
GOLDEN_ROWS = [
    ("official", 0.2, {}, K20),
    ("official", 0.3, {}, K30),
    ("official", 0.3, {"merge": "sum"}, [0.9, -0.5, 0.8, 0, 0, -0.7, 0.8, 0.55, 1.05, -0.6]),
    ("official", 0.3, {"merge": "max"}, [0.9, -0.5, 0.4, 0, 0, -0.7, 0.8, 0.55, 0.6, -0.6]),
    ("official", 0.5, {}, K50),
    ("official", 0.5, {"merge": "sum"}, [1.2, -0.5, 0.8, 0, 0.3, -0.9, 0.8, 0.55, 1.05, 0.6]),
    ("official", 0.5, {"merge": "max"}, [0.9, -0.5, 0.4, 0, 0.3, -0.7, 0.8, 0.55, 0.6, 0.35]),
    ("adamerging", 0.5, {}, [1.2, -0.5, 0.8, 0, 0.3, -0.9, 0.8, 0.55, 1.05, 0.6]),
    ("fusionbench", 0.3, {}, [0.9, -0.5, 0.8, 0, 0, -0.7, 0.8, 0.55, 1.05, -0.6]),
    ("mergekit", 0.2, {}, [0.9, 0, -0.8, 0, 0, -0.7, 0.8, 0, 0.6, -0.6]),
    ("mergekit", 0.3, {}, [0.9, -0.5, -0.8, 0, 0, -0.7, 0.8, 0.55, 0.6, -0.6]),
    ("mergekit", 0.5, {}, M50),
    ("peft", 0.2, {}, [0.9, 0, -0.8, 0, 0, -0.7, 0.8, 0, 0.6, -0.6]),
    ("peft", 0.3, {}, [0.9, -0.5, -0.8, 0, 0, -0.7, 0.8, 0.55, 0.6, -0.6]),
    ("peft", 0.5, {}, M50),
    ("peft", 0.5, {"elect": "count"}, [*M50[:9], 0.35]),
]


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize(("semantics", "density", "details", "expected"), GOLDEN_ROWS)
def test_golden_vectors(
    semantics: str,
    density: float,
    details: dict[str, str],
    expected: list[float],
    identifier: str,
    use_backend: Callable[[str], str],
) -> None:
    merged = pymerge.ties_merge(
        torch.zeros(10),
        list(GOLDEN),
        density=density,
        semantics=semantics,
        backend=use_backend(identifier),
        **details,
    )
    torch.testing.assert_close(merged, torch.tensor(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("density", "kept"), [(0.2, [3, 3, 3]), (0.3, [4, 4, 4]), (0.5, [6, 6, 7])]
)
def test_official_trim_keeps_one_more_and_all_ties(density: float, kept: list[int]) -> None:
    for row, count in zip(GOLDEN, kept, strict=True):
        merged = pymerge.ties_merge(torch.zeros(10), [row], density=density)
        assert int((merged != 0).sum()) == count


SHAPES = {
    "b.weight": (32, 40),
    "a.bias": (40,),
    "c.scale": (),
    "d.empty": (0, 4),
    "B.weight": (40, 90),
}


def random_models(
    count: int, dtype: torch.dtype, seed: int, coarse: bool
) -> tuple[oracles.State, list[oracles.State]]:
    """Return a base and fine-tuned models; coarse deltas are dyadic, with many ties and cancelling
    votes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        return (values * 8).round() / 8 if coarse else values * 1e-3

    base = {name: draw(shape).to(dtype) for name, shape in SHAPES.items()}
    models = [
        {name: (base[name].float() + draw(shape)).to(dtype) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]
    return base, models


def deltas_of(base: oracles.State, models: list[oracles.State]) -> torch.Tensor:
    origin = oracles.flatten(base)
    return torch.stack([oracles.flatten(model) - origin for model in models])


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merge", ["mean", "sum", "max"])
def test_official_whole_model(
    merge: str,
    dtype: torch.dtype,
    coarse: bool,
    identifier: str,
    use_backend: Callable[[str], str],
) -> None:
    """Equal to the official algorithm on the flattened model, with many equal magnitudes and zero
    votes."""
    backend = use_backend(identifier)
    for count, density in itertools.product([1, 2, 3, 8], [0.0, 0.05, 0.2, 0.5]):
        base, models = random_models(count, dtype, seed=count, coarse=coarse)
        merged = pymerge.ties_merge(base, models, density=density, merge=merge, backend=backend)
        delta = oracles.official_delta(deltas_of(base, models), density, merge)
        for name, expected in oracles.unflatten(delta, base).items():
            expected = (base[name].float() + expected).to(dtype)
            assert torch.equal(merged[name], expected), (name, count, density)


def tensorwise(
    base: oracles.State, models: list[oracles.State], name: str, rule: Callable[..., torch.Tensor]
) -> torch.Tensor:
    origin = base[name].reshape(-1).float()
    deltas = torch.stack([model[name].reshape(-1).float() - origin for model in models])
    if deltas.numel() == 0:
        return base[name]
    return (origin + rule(deltas)).to(base[name].dtype).reshape(base[name].shape)


WEIGHTS = [0.5, -1.0, 2.0, 0.25, 1.0, 1.5, -0.5, 3.0]


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_per_tensor_dialects(
    dtype: torch.dtype, identifier: str, use_backend: Callable[[str], str]
) -> None:
    backend = use_backend(identifier)
    for count, density, coarse in itertools.product(
        [1, 2, 3, 8], [0.0, 0.1, 0.5, 1.0], [True, False]
    ):
        base, models = random_models(count, dtype, seed=100 + count, coarse=coarse)
        weights = WEIGHTS[:count]
        rules: list[tuple[dict[str, object], Callable[[torch.Tensor], torch.Tensor]]] = [
            (
                {"semantics": "mergekit", "weights": weights},
                lambda d, w=weights: oracles.mergekit_delta(d, density, w, normalize=True),
            ),
            (
                {"semantics": "mergekit", "weights": weights, "normalize": False},
                lambda d, w=weights: oracles.mergekit_delta(d, density, w, normalize=False),
            ),
            (
                {"semantics": "peft", "weights": weights},
                lambda d, w=weights: oracles.peft_delta(d, density, w, frequency=False),
            ),
            (
                {"semantics": "peft", "weights": weights, "elect": "count"},
                lambda d, w=weights: oracles.peft_delta(d, density, w, frequency=True),
            ),
            (
                {"semantics": "sd_mecha"},
                lambda d: oracles.sd_mecha_delta(d, density, by_mass=False),
            ),
            (
                {"semantics": "sd_mecha", "elect": "mass"},
                lambda d: oracles.sd_mecha_delta(d, density, by_mass=True),
            ),
        ]
        for arguments, rule in rules:
            merged = pymerge.ties_merge(base, models, density=density, backend=backend, **arguments)
            for name in base:
                expected = tensorwise(base, models, name, rule)
                assert torch.equal(merged[name], expected), (arguments, name, count, density)


@pytest.mark.parametrize("coarse", [True, False])
def test_mergelm(coarse: bool) -> None:
    for count, density in itertools.product([1, 2, 3], [0.0, 0.2, 0.5]):
        base, models = random_models(count, torch.float32, seed=7, coarse=coarse)
        merged = pymerge.ties_merge(base, models, density=density, semantics="mergelm")
        delta = oracles.mergelm_delta(deltas_of(base, models), density)
        for name, expected in oracles.unflatten(delta, base).items():
            assert torch.equal(merged[name], base[name] + expected)


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize(("extra", "sign"), [(1.0, 1), (-1.0, -1), (None, 0)])
def test_zero_vote_takes_the_sign_of_the_whole_model(
    extra: float | None, sign: int, identifier: str, use_backend: Callable[[str], str]
) -> None:
    """Official: a zero vote takes the majority of all signs; 0 acts as negative. MergeLM: 0 keeps
    nothing."""
    backend = use_backend(identifier)
    first = {"a": torch.tensor([2.0, 0.5]), "z": torch.tensor([0.0 if extra is None else extra])}
    second = {"a": torch.tensor([-2.0, -0.5]), "z": torch.zeros(1)}
    base = {name: torch.zeros_like(tensor) for name, tensor in first.items()}

    def merged(**details: str) -> torch.Tensor:
        return pymerge.ties_merge(base, [first, second], density=1.0, backend=backend, **details)[
            "a"
        ]

    value = torch.tensor([2.0, 0.5])
    assert torch.equal(merged(), value if sign > 0 else -value)
    assert torch.equal(merged(merge="max"), value * sign)
    assert torch.equal(merged(semantics="mergelm"), value * sign)
    assert torch.equal(merged(semantics="mergekit"), value)
    # per tensor, tensor "a" alone is undecided whatever "z" holds
    assert torch.equal(merged(scope="tensor"), -value)


def test_weights_of_official_scale_the_task_vectors() -> None:
    """Documented extension: the official code on task vectors that were scaled beforehand."""
    base, models = random_models(3, torch.float32, seed=5, coarse=True)
    weights = [0.5, 2.0, 0.25]
    merged = pymerge.ties_merge(base, models, density=0.3, weights=weights)
    scaled = deltas_of(base, models) * torch.tensor(weights).reshape(-1, 1)
    expected = oracles.unflatten(oracles.official_delta(scaled, 0.3, "mean"), base)
    for name, tensor in expected.items():
        assert torch.equal(merged[name], base[name] + tensor)


def test_scale_and_density_of_each_model() -> None:
    base = torch.zeros(1000)
    models = [torch.randn(1000, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    merged = pymerge.ties_merge(
        base, models, density=[0.1, 0.5], scale=0.5, semantics="mergekit", normalize=False
    )
    kept = torch.stack([oracles._exactly(models[0], 100), oracles._exactly(models[1], 500)])
    positive = kept.sum(dim=0) >= 0
    agrees = torch.where(positive, kept > 0, kept < 0)
    assert torch.equal(merged, 0.5 * (kept * agrees).sum(dim=0))


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_exact_k_keeps_exactly_k_lowest_index_first(semantics: str) -> None:
    base = torch.zeros(100)
    model = torch.tensor([1.0, -1.0]).repeat(50)
    for density in (0.01, 0.2, 0.37):
        merged = pymerge.ties_merge(
            base, [model], density=density, semantics=semantics, exact_k=True
        )
        kept = merged.nonzero().flatten().tolist()
        count = {
            "mergelm": 100 - int(100 * (1 - density)),
            "sd_mecha": 100 - int((1 - density) * 100),
        }.get(semantics, int(100 * density))
        assert kept == list(range(count))
        loose = pymerge.ties_merge(
            base, [model], density=density, semantics=semantics, exact_k=False
        )
        assert int((loose != 0).sum()) == 100


@pytest.mark.parametrize(
    ("semantics", "density", "total", "expected"),
    [
        ("official", 0.2, 10, TrimTarget("rank", 8)),
        ("official", 1.0, 10, TrimTarget("all")),  # the code raises: kthvalue(0)
        ("official", 0.0, 10, TrimTarget("rank", 10)),
        ("official", 0.01, 10, TrimTarget("rank", 10)),
        ("mergelm", 0.2, 10, TrimTarget("rank", 8)),
        ("mergelm", 1.0, 10, TrimTarget("all")),
        ("mergekit", 0.2, 10, TrimTarget("rank", 9, True)),
        ("mergekit", 0.01, 10, TrimTarget("rank", 10, True)),  # at least one
        ("mergekit", 0.0, 10, TrimTarget("none")),
        ("mergekit", 1.0, 10, TrimTarget("all")),
        ("peft", 0.01, 10, TrimTarget("none")),
        ("peft", 0.2, 7, TrimTarget("rank", 7, True)),
        ("sd_mecha", 1.0, 10, TrimTarget("rank", 1)),
        ("sd_mecha", 0.2, 7, TrimTarget("rank", 5)),  # int(0.8 * 7) = 5
        ("official", 0.2, 7, TrimTarget("rank", 6)),  # 7 - int(1.4) = 6: not the same
        ("official", 0.5, 0, TrimTarget("all")),
    ],
)
def test_number_kept(semantics: str, density: float, total: int, expected: TrimTarget) -> None:
    """D2, D3: the products are truncated as the codes truncate them."""
    assert trim_target(ties_rule(semantics), density, total) == expected


def test_thresholds_of_zero_keep_everything() -> None:
    """A model fine-tuned in few places: the order statistic is 0, and the rest is left alone."""
    base = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    model = base.clone()
    model[100:200] += 1.0
    for semantics in SEMANTICS:
        merged = pymerge.ties_merge(base, [model], density=0.5, semantics=semantics)
        assert torch.equal(merged, base + (model - base)), semantics
    assert torch.equal(pymerge.ties_merge(base, [base.clone()] * 3, density=0.2), base)


def test_unknown_choices_name_the_nearest() -> None:
    base = torch.zeros(3)
    cases: list[tuple[dict[str, object], str]] = [
        ({"semantics": "oficial"}, "did you mean 'official'"),
        ({"scope": "tensors"}, "did you mean 'tensor'"),
        ({"merge": "average"}, "one of 'mean', 'sum', 'max'"),
        ({"elect": "counts"}, "did you mean 'count'"),
        ({"density": 1.01}, r"a finite number in \[0, 1\], got 1.01"),
        ({"density": -0.1}, "got -0.1"),
        ({"density": float("nan")}, "got nan"),
        ({"density": [0.1]}, "expected one number or 2, one for each model; got 1"),
        ({"exact_k": 1}, "true or false, got 1"),
        ({"nan": "ignore"}, "one of 'error', 'keep'"),
        ({"merge": "max", "normalize": True}, "give one of the two"),
    ]
    for arguments, message in cases:
        with pytest.raises(pymerge.RequestError, match=message):
            pymerge.ties_merge(base, [base, base], **arguments)


@pytest.mark.parametrize("semantics", ["official", "mergelm"])
def test_models_of_float32_and_float64_are_trimmed_in_float64(semantics: str) -> None:
    """One order of all magnitudes, whatever the tensor; each result is rounded to its dtype."""
    generator = torch.Generator().manual_seed(12)
    names = {"a": torch.float32, "b": torch.float64, "c": torch.bfloat16}
    base = {
        name: (torch.randn(500, generator=generator, dtype=torch.float64) / 3).to(dtype)
        for name, dtype in names.items()
    }
    tuned = [
        {
            name: tensor + torch.randn(500, generator=generator, dtype=tensor.dtype) / 7
            for name, tensor in base.items()
        }
        for _ in range(3)
    ]
    merged = pymerge.ties_merge(base, tuned, density=0.3, semantics=semantics)
    doubles = [
        {name: tensor.double() for name, tensor in state.items()} for state in (base, *tuned)
    ]
    expected = pymerge.ties_merge(doubles[0], doubles[1:], density=0.3, semantics=semantics)
    for name, dtype in names.items():
        assert torch.equal(merged[name], expected[name].to(dtype)), name
