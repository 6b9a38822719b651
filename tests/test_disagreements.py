"""Where papers, the authors' codes and other tools disagree: both readings, by name, by hand.

One test for each row of "Where sources disagree" in docs/methods.md.
"""

from __future__ import annotations

import math

import pytest
import torch

import pymerge

T = torch.tensor


def zeros(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like)


def test_scope_of_the_trim() -> None:
    """Half of everything is in the second tensor; half of each tensor is not."""
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    tuned = {"a": T([0.1, 0.2, 0.3, 0.4]), "b": T([1.0, 2.0, 3.0, 4.0])}
    whole = pymerge.ties_merge(base, [tuned], density=0.375, scope="global")
    each = pymerge.ties_merge(base, [tuned], density=0.5, scope="tensor", semantics="mergekit")
    assert torch.equal(whole["a"], torch.zeros(4))
    assert torch.equal(whole["b"], tuned["b"])
    assert torch.equal(each["a"], T([0.0, 0.0, 0.3, 0.4]))
    assert torch.equal(each["b"], T([0.0, 0.0, 3.0, 4.0]))


def test_number_of_kept_elements() -> None:
    tuned = T([0.5, 0.25, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 64.0])
    counts = {
        "official": 3,  # int(0.2 * 10) + 1, and what equals the threshold
        "mergelm": 3,
        "sd_mecha": 3,
        "mergekit": 2,
        "peft": 2,
    }
    for semantics, count in counts.items():
        merged = pymerge.ties_merge(zeros(tuned), [tuned], density=0.2, semantics=semantics)
        assert int(merged.count_nonzero()) == count, semantics
    # Equal magnitudes: all of them, or the first.
    even = torch.ones(10)
    assert int(pymerge.ties_merge(zeros(even), [even], density=0.2).count_nonzero()) == 10
    exact = pymerge.ties_merge(zeros(even), [even], density=0.2, semantics="peft")
    assert torch.equal(exact, T([1.0, 1.0] + [0.0] * 8))


@pytest.mark.parametrize("semantics", ["official", "mergelm", "mergekit", "peft", "sd_mecha"])
def test_a_density_of_one_keeps_all(semantics: str) -> None:
    """The official code asks for the 0-th smallest value there, and fails."""
    tuned = T([0.5, -0.25, 1.0])
    merged = pymerge.ties_merge(zeros(tuned), [tuned], density=1.0, semantics=semantics)
    assert torch.equal(merged, tuned)


def test_sign_of_a_vote_of_zero() -> None:
    """The first element's vote is 0; the majority of all elements is negative."""
    a, b = T([0.5, -1.0, -1.0]), T([-0.5, -1.0, -1.0])
    expected = {"official": -0.5, "mergelm": -0.5, "mergekit": 0.5, "peft": 0.5, "sd_mecha": 0.0}
    for semantics, first in expected.items():
        merged = pymerge.ties_merge(zeros(a), [a, b], density=1.0, semantics=semantics)
        assert float(merged[0]) == first, semantics


def test_a_majority_of_zero() -> None:
    """MergeLM keeps nothing then; the official code takes the negative side."""
    a, b = T([0.5, -1.0, 1.0]), T([-0.5, -1.0, 1.0])
    official = pymerge.ties_merge(zeros(a), [a, b], density=1.0, semantics="official")
    mergelm = pymerge.ties_merge(zeros(a), [a, b], density=1.0, semantics="mergelm")
    assert official.tolist() == [-0.5, -1.0, 1.0]
    assert mergelm.tolist() == [0.0, -1.0, 1.0]


def test_mean_or_sum() -> None:
    tuned = [T([1.0, 2.0]), T([3.0, -1.0])]
    mean = pymerge.ties_merge(zeros(tuned[0]), tuned, density=1.0)
    for semantics in ("adamerging", "fusionbench"):
        total = pymerge.ties_merge(zeros(tuned[0]), tuned, density=1.0, semantics=semantics)
        assert total.tolist() == [4.0, 2.0]
    assert mean.tolist() == [2.0, 2.0]


def test_weights_before_or_after_the_election_and_the_divisor() -> None:
    """Before: 3 * 1 outvotes -2. The divisor is the sum of weights, or the count."""
    tuned, weights = [T([1.0, 1.0]), T([-2.0, 3.0])], [3.0, 1.0]
    before = pymerge.ties_merge(
        zeros(tuned[0]), tuned, density=1.0, weights=weights, semantics="mergekit"
    )
    after = pymerge.ties_merge(
        zeros(tuned[0]), tuned, density=1.0, weights=weights, semantics="peft"
    )
    assert before.tolist() == [1.0, 1.5]  # 3 * 1 / 3; (3 * 1 + 1 * 3) / 4
    assert after.tolist() == [-2.0, 3.0]  # 1 * -2 / 1; (3 * 1 + 1 * 3) / 2


def conflicts() -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(2000, generator=generator) * 0.02
    second = torch.randn(2000, generator=generator) * 0.02
    return zeros(first), [first, second]


def test_pcb_with_softmax_or_tanh() -> None:
    """tanh of tau_i (tau_i + tau_j) has a sign: of two that conflict the weaker is dropped. A
    softmax is positive: both may be kept, and mix."""
    base, (first, second) = conflicts()
    opposed = first * second < 0
    stronger = torch.where(first.abs() > second.abs(), first, second)
    mixed = {}
    for variant in ("paper", "root"):
        merged = pymerge.pcb_merge(base, [first, second], variant=variant, ratio=0.3)
        kept = opposed & (merged != 0)
        apart = (merged - stronger).abs() > 1e-6
        mixed[variant] = int((apart & kept).sum()) / int(kept.sum())
    assert mixed["root"] < 0.01  # the few that were clipped
    assert mixed["paper"] > 0.1


def test_pcb_variants_differ_from_each_other() -> None:
    base, tuned = conflicts()
    merged = {
        variant: pymerge.pcb_merge(base, tuned, variant=variant, ratio=0.2, coefficients=1.0)
        for variant in ("paper", "root", "nlp", "vision", "vision_es")
    }
    names = list(merged)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not torch.equal(merged[first], merged[second]), (first, second)


def test_pcb_clips_one_in_ten_thousand_or_one_in_a_hundred() -> None:
    """root clips 2000 elements at the second largest, nlp at the 1980th."""
    base, tuned = conflicts()
    ordered = tuned[0].abs().sort().values
    alone = {
        variant: pymerge.pcb_merge(base, [tuned[0]], variant=variant, ratio=0.5)
        for variant in ("root", "nlp")
    }
    assert float(alone["root"].abs().max()) == float(ordered[1998])
    assert float(alone["nlp"].abs().max()) == float(ordered[1979])


def test_pcb_weighs_by_shifted_scores_or_by_scores() -> None:
    """Of the authors' scores the threshold is subtracted; of the paper's it is not."""
    base = torch.zeros(4)
    a, b = T([1.0, 2.0, 3.0, 4.0]), T([4.0, 3.0, 2.0, 1.0])
    paper = pymerge.pcb_merge(base, [a, b], variant="paper", ratio=1.0)
    root = pymerge.pcb_merge(base, [a, b], variant="root", ratio=1.0)
    # The least score of each model weighs nothing in the code: its element is the other's.
    assert float(root[0]) in (3.0, 4.0)
    assert 1.0 < float(paper[0]) < 4.0


def test_dare_rescales_by_the_probability_or_to_the_norm() -> None:
    tuned = T([1.0, 2.0, 4.0, 8.0] * 64)
    how = {"density": 0.5, "seed": 3}
    inverse = pymerge.dare_linear(zeros(tuned), [tuned], rescale="inv_keep", **how)
    norm = pymerge.dare_linear(zeros(tuned), [tuned], rescale="l1", **how)
    plain = pymerge.dare_linear(zeros(tuned), [tuned], rescale="none", **how)
    assert torch.equal(inverse, 2.0 * plain)
    torch.testing.assert_close(norm.sum(), tuned.sum())
    assert torch.equal(plain != 0, norm != 0)


def test_dare_ties_with_and_without_the_trim() -> None:
    tuned = torch.arange(1.0, 101.0)
    how = {"density": 0.5, "rescale": "none", "seed": 1}
    drawn = pymerge.dare_ties(zeros(tuned), [tuned], **how)
    trimmed = pymerge.dare_ties(zeros(tuned), [tuned], trim=0.1, **how)
    largest = drawn.sort(descending=True).values[9]
    assert torch.equal(trimmed, torch.where(drawn >= largest, drawn, zeros(drawn)))


def test_breadcrumbs_of_rows_or_of_a_tensor() -> None:
    tuned = T([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    how = {"density": 0.5, "gamma": 0.25}
    rows = pymerge.breadcrumbs(zeros(tuned), [tuned], scope="row", **how)
    whole = pymerge.breadcrumbs(zeros(tuned), [tuned], **how)
    assert rows.tolist() == [[0.0, 2.0, 3.0, 0.0], [0.0, 20.0, 30.0, 0.0]]
    assert whole.tolist() == [[0.0, 0.0, 3.0, 4.0], [10.0, 20.0, 0.0, 0.0]]


def test_breadcrumbs_that_drop_none_of_the_largest_keep_the_rest() -> None:
    """mergekit up to 0.1.4 kept nothing where int(gamma n) was 0."""
    tuned = torch.arange(1.0, 11.0)
    merged = pymerge.breadcrumbs(zeros(tuned), [tuned], density=0.5, gamma=0.01)
    assert merged.tolist() == [0.0] * 5 + [6.0, 7.0, 8.0, 9.0, 10.0]


def test_della_rescales_each_element_or_to_the_norm() -> None:
    tuned = torch.arange(1.0, 201.0)
    how = {"density": 0.5, "epsilon": 0.2, "seed": 2}
    plain = pymerge.della_linear(zeros(tuned), [tuned], rescale="none", **how)
    each = pymerge.della_linear(zeros(tuned), [tuned], rescale="per_element", **how)
    norm = pymerge.della_linear(zeros(tuned), [tuned], rescale="l1", **how)
    chance = 0.3 + 0.4 * torch.arange(200.0) / 199
    torch.testing.assert_close(each, plain / chance)
    torch.testing.assert_close(norm, plain * (tuned.sum() / plain.sum()))


def test_della_of_one_column() -> None:
    """0 / 0 in other codes: every element has the mean probability."""
    tuned = torch.ones(4000, 1)
    merged = pymerge.della_linear(zeros(tuned), [tuned], density=0.25, epsilon=0.1)
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    assert abs(float((merged != 0).float().mean()) - 0.25) < 0.03


def test_sce_selects_for_the_weights_or_for_all_that_follows() -> None:
    a, b = T([4.0, 1.0, 1.0, 0.0]), T([0.0, 1.0, 2.0, 0.0])
    weights = pymerge.sce(zeros(a), [a, b], select_topk=0.5)
    everywhere = pymerge.merge("sce", zeros(a), [a, b], select_topk=0.5, mask="everywhere")
    # Variances 4, 0, 0.25, 0: half of the two that are not 0 is the first element.
    assert everywhere.tolist() == [4.0, 0.0, 0.0, 0.0]
    assert weights.tolist() == [4.0, 1.0, 1.0, 0.0]  # all weight is a's


def test_sce_of_small_task_vectors() -> None:
    """mergekit weighs all models the same where the mean squares add up to less than 1e-6."""
    a, b = T([4e-4, 2e-4]), T([1e-4, 1e-4])
    authors = pymerge.sce(zeros(a), [a, b])
    mergekit = pymerge.merge("sce", zeros(a), [a, b], mask="everywhere")
    torch.testing.assert_close(mergekit, (a + b) / 2)
    energies = a.square().mean(), b.square().mean()
    expected = (energies[0] * a + energies[1] * b) / (energies[0] + energies[1])
    torch.testing.assert_close(authors, expected)
    # They are means: the size of the tensor plays no part.
    many = pymerge.merge(
        "sce", zeros(a.repeat(500)), [a.repeat(500), b.repeat(500)], mask="everywhere"
    )
    assert torch.equal(many, mergekit.repeat(500))


def test_model_stock_by_the_mean_cosine_or_the_mean_angle() -> None:
    a, b, c = T([1.0, 0.0]), T([0.0, 1.0]), T([1.0, 0.0])
    average = (a + b + c) / 3
    for angle, cosine in (
        ("cosine", (0 + 1 + 0) / 3),
        ("angle", math.cos((math.pi / 2 + 0 + math.pi / 2) / 3)),
    ):
        ratio = 3 * cosine / (1 + 2 * cosine)
        merged = pymerge.model_stock(torch.zeros(2), [a, b, c], angle=angle)
        torch.testing.assert_close(merged, ratio * average, atol=1e-6, rtol=0)


def test_sums_of_bfloat16_are_taken_in_float32() -> None:
    """mergekit up to 0.1.4 rounded every partial sum to the tensors' dtype."""
    models = [T([1.0]).bfloat16(), *(T([2.0**-9]).bfloat16() for _ in range(8))]
    merged = pymerge.linear(models, weights=[1.0] * 9, normalize=False)
    assert float(merged) == 1.015625  # 1 + 8 * 2^-9
    rounded = models[0]
    for model in models[1:]:
        rounded = rounded + model
    assert float(rounded) == 1.0


def test_weights_that_sum_to_zero() -> None:
    """Infinity in mergekit 0.1.5's linear; a division by 1 in its task arithmetic."""
    models = [T([1.0]), T([2.0])]
    with pytest.raises(pymerge.RequestError, match="sum to 0"):
        pymerge.linear(models, weights=[1.0, -1.0])
    plain = pymerge.task_arithmetic(T([0.0]), models, weights=[1.0, -1.0])
    assert plain.tolist() == [-1.0]


def test_fisher_information_per_label_or_with_cross_terms() -> None:
    """One example, two labels, d log p(y) = -1, 1 at p = 1/2. Squares summed: 1/2 + 1/2. MergeLM
    squares the sum of sqrt(p) log p, in which the two cancel."""
    model = torch.nn.Linear(1, 2)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    loader = [T([[2.0]])]
    exact = pymerge.collect_fisher(model, loader)
    batch = pymerge.collect_fisher(model, loader, estimator="batch")
    assert exact["bias"].tolist() == [0.25, 0.25]  # sum_y p (y - p)^2 = 2 * 1/2 * 1/4
    assert exact["weight"].tolist() == [[1.0], [1.0]]
    assert float(batch["bias"].abs().max()) == 0.0
    # Two equal examples: the mean stays; the square of a sum of two, halved, doubles.
    torch.nn.init.constant_(model.bias[:1].detach(), 1.0)
    twice = [T([[2.0], [2.0]])]
    torch.testing.assert_close(
        pymerge.collect_fisher(model, twice)["bias"], pymerge.collect_fisher(model, loader)["bias"]
    )
    torch.testing.assert_close(
        pymerge.collect_fisher(model, twice, estimator="batch")["bias"],
        2 * pymerge.collect_fisher(model, loader, estimator="batch")["bias"],
    )


def test_the_floor_of_fisher_information() -> None:
    """Of the first model alone (official), added to all (MergeLM), or under all (mats)."""
    models, known = [T([0.0, 0.0]), T([1.0, 1.0])], [T([0.0, 0.0]), T([0.0, 2e-6])]
    how = {"normalize": False, "floor": 1e-6}
    official = pymerge.fisher_merge(models, known, **how)
    mergelm = pymerge.fisher_merge(models, known, semantics="mergelm", **how)
    mats = pymerge.fisher_merge(models, known, semantics="mats", **how)
    torch.testing.assert_close(official, T([0.0, 2 / 3]))  # 0 / (1 + 0), 2 / (1 + 2)
    torch.testing.assert_close(mergelm, T([0.5, 3 / 4]))  # 1 / (1 + 1), 3 / (1 + 3)
    torch.testing.assert_close(mats, T([0.5, 2 / 3]))  # 1 / (1 + 1), 2 / (1 + 2)


def test_off_diagonal_elements_of_gram_matrices() -> None:
    """The authors' code leaves them by default, as MergeLM does; FusionBench takes 0.95."""
    models = [torch.eye(2), T([[0.0, 1.0], [1.0, 0.0]])]
    grams = [T([[2.0, 1.0], [1.0, 2.0]]), T([[3.0, -1.0], [-1.0, 1.0]])]
    for semantics, factor in (("official", 1.0), ("mergelm", 1.0), ("fusionbench", 0.95)):
        scaled = [torch.where(torch.eye(2) > 0, gram, factor * gram) for gram in grams]
        total = sum(g @ w.T for g, w in zip(scaled, models, strict=True))
        expected = torch.linalg.solve(sum(scaled), total).T
        merged = pymerge.regmean_merge(models, grams, semantics=semantics)
        torch.testing.assert_close(merged, expected)


def test_where_the_scale_of_gradient_matching_stands() -> None:
    """A weight a_k stands above and below; the authors' s only below, and before the sum."""
    base, model, hessian = torch.zeros(1), torch.ones(1), torch.ones(1)
    how = {"base_fisher": torch.ones(1), "scale": 0.5}
    code = pymerge.gradient_matching(base, [model], [hessian], **how)
    torch.testing.assert_close(code, T([0.5 * (1 + 1) / (0.5 + 1)]))
    both = pymerge.gradient_matching(
        base, [model], [hessian], base_fisher=torch.ones(1), weights=0.5
    )
    torch.testing.assert_close(both, T([(0.5 + 1) / (0.5 + 1)]))


def test_gradient_based_merging_as_its_code_or_as_its_formula() -> None:
    """The code steps down the mean of the tasks' gradients; the formula matches gradients to those
    at each task's own model."""
    model = torch.nn.Linear(1, 1, bias=False)
    states = [{"weight": T([[weight]])} for weight in (1.0, 3.0)]
    data = [[T([[1.0]])]] * 2

    def loss(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net(x).square().sum()  # the gradient at w is 2 w

    def step(objective: str) -> float:
        merged = pymerge.gradient_merge(
            model, states, data, loss, objective=objective, steps=1, lr=0.01
        )
        return float(merged["weight"])

    assert math.isclose(step("average"), 1 - 0.01 * 2, rel_tol=1e-6)
    # d/dw [(2w - 2)^2 + (2w - 6)^2] at 1: 2 * 2 * (0 - 4)
    assert math.isclose(step("matching"), 1 + 0.01 * 16, rel_tol=1e-6)
