from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.estimators.fit import FitOptions, fit_direction
from vllm_steer.offline.estimators.labelled_rows import (
    LabelledRows,
    centred_unit_rows,
    pearson,
    split_point,
    unit_rows,
)
from vllm_steer.offline.estimators.labels import interleave, min_max
from vllm_steer.offline.estimators.rfm import (
    AUTHORS,
    RfmOptions,
    agop_matrices,
    gram_eigenvectors,
    rfm,
    top_eigenvector,
    xrfm_eigenvectors,
)

ESTIMATORS = ["rfm", "ridge", "pca", "mean_difference"]
SOLVERS = ["xrfm", "gram"]


def make_rows(pairs: int = 60, size: int = 16, signal: float = 3.0, seed: int = 0) -> LabelledRows:
    """Rows whose coordinate 0 carries the label, amid noise and a large common offset."""
    rng = np.random.default_rng(seed)
    _, positive = interleave(pairs, pairs)
    labels = np.where(positive, rng.uniform(0.1, 0.6, 2 * pairs), 0.0)
    hidden = rng.standard_normal((2 * pairs, size))
    hidden[:, 0] += signal * labels / 0.35
    hidden[:, 1] += 5.0
    return LabelledRows("rows", hidden.astype(np.float32), labels.astype(np.float32), positive)


def dense_matrices(x: np.ndarray, y: np.ndarray, bandwidth: float) -> list[np.ndarray]:
    """M_1 … M_9 in float64, written out from the method's definition without any shortcut."""
    n, size = x.shape
    difference = x[:, None, :] - x[None, :, :]
    matrix, matrices = np.eye(size), []
    for _ in range(9):
        squared = np.einsum("ijd,de,ije->ij", difference, matrix, difference)
        distance = np.sqrt(np.maximum(squared, 0))
        np.fill_diagonal(distance, 0)
        kernel = np.exp(-distance / bandwidth)
        alpha = np.linalg.solve(kernel + 1e-3 * np.eye(n), y)
        with np.errstate(divide="ignore"):
            ratio = np.where(distance > 0, kernel / distance, 0)
        gradient = np.einsum("i,ij,de,ije->jd", alpha, ratio, matrix, difference)
        gradient -= gradient.mean(axis=0)
        matrix = gradient.T @ gradient / (n * bandwidth**2)
        matrix = matrix / matrix.max()
        matrices.append(matrix)
    return matrices


def dense_rfm(rows: LabelledRows) -> tuple[np.ndarray, float]:
    """The whole selection from the method's definition, unsigned."""
    x = rows.hidden.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    y = (rows.labels - rows.labels.min()) / (rows.labels.max() - rows.labels.min())
    train = len(y) - int(0.2 * len(y))
    best_r, best = -1.0, np.zeros(x.shape[1])
    for bandwidth in (1.0, 10.0, 100.0):
        for normalise in (True, False):
            states = x - x[:train].mean(axis=0)
            if normalise:
                states = states / np.linalg.norm(states, axis=1, keepdims=True)
            scored = []
            for matrix in dense_matrices(states[:train], y[:train], bandwidth):
                vector = np.linalg.eigh(matrix)[1][:, -1]
                scored.append((abs(np.corrcoef(states[train:] @ vector, y[train:])[0, 1]), vector))
            r, vector = max(scored, key=lambda pair: pair[0])
            if r >= best_r:
                best_r, best = r, vector
    return best, best_r


@pytest.mark.parametrize(
    ("rows", "train"), [(400, 320), (200, 160), (2000, 1744), (15, 12), (16, 14), (12, 10)]
)
def test_split_leaves_a_fifth_at_most_256_in_whole_pairs(rows, train):
    assert split_point(rows) == train


@pytest.mark.parametrize("bandwidth", AUTHORS.bandwidths)
def test_matrices_equal_the_dense_definition(bandwidth):
    rows = make_rows(pairs=40, size=12)
    states = rows.hidden.astype(np.float64)
    states /= np.linalg.norm(states, axis=1, keepdims=True)
    states -= states[:64].mean(axis=0)
    labels = min_max(rows.labels.astype(np.float64))
    found = agop_matrices(states, labels, 64, bandwidth)
    expected = dense_matrices(states[:64], labels[:64], bandwidth)
    assert len(found) == len(expected) == 9  # from M_1 on: the identity is no candidate
    for ours, theirs in zip(found, expected, strict=True):
        error = np.linalg.norm(ours.numpy() - theirs) / np.linalg.norm(theirs)
        assert error < 2e-4
        assert ours.max() == pytest.approx(1)
        assert ours.argmax() % 13 == 0  # the largest entry of a Gram matrix is on its diagonal


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rfm_equals_the_dense_definition(seed, solver):
    rows = make_rows(pairs=40, size=12, signal=1.0, seed=seed)
    found = fit_direction("rfm", rows, FitOptions(rfm=RfmOptions(solver=solver)))
    vector, r = dense_rfm(rows)
    # The fit is in float32, this definition in float64.
    assert found.validation_r == pytest.approx(r, abs=2e-4)
    assert abs(found.vector @ vector) > 0.9999


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("bandwidth", AUTHORS.bandwidths)
def test_gram_form_gives_the_eigenvectors_of_every_iteration(bandwidth, normalise, center):
    """Where the gap to the second eigenvalue is wide enough to tell them apart."""
    rows = make_rows(pairs=50, size=150, signal=1.0)
    train = split_point(len(rows.labels))
    states = centred_unit_rows(rows.hidden, train)
    states = unit_rows(states) if normalise else states
    labels = min_max(rows.labels.astype(np.float64))
    options = RfmOptions(center_gradients=center)
    given = (states, labels, train, bandwidth, options)
    matrices = [matrix.numpy() for matrix in agop_matrices(*given)]
    compared = 0
    for vector, matrix in zip(gram_eigenvectors(*given, seed=0), matrices, strict=True):
        second, first = np.linalg.eigvalsh(matrix)[-2:]
        if second / first < 0.9:
            compared += 1
            assert abs(vector @ top_eigenvector(matrix, seed=0)) > 0.9999
        assert vector @ matrix @ vector == pytest.approx(first, rel=2e-4)
    assert compared >= 3


@pytest.mark.parametrize("seed", [0, 1])
def test_solvers_choose_the_same_direction(seed):
    rows = make_rows(pairs=60, size=200, signal=1.5, seed=seed)
    ours, theirs = (rfm(rows, seed=0, options=RfmOptions(solver=solver)) for solver in SOLVERS)
    assert abs(ours.vector @ theirs.vector) > 0.9999
    assert ours.validation_r == pytest.approx(theirs.validation_r, abs=5e-4)
    assert ours.choice == theirs.choice


def test_the_faster_solver_is_chosen_by_the_hidden_size(monkeypatch):
    used = []
    for name, function in (("gram", gram_eigenvectors), ("xrfm", xrfm_eigenvectors)):

        def watched(*args, name=name, function=function):
            used.append(name)
            return function(*args)

        monkeypatch.setattr(f"vllm_steer.offline.estimators.rfm.{name}_eigenvectors", watched)
    for size in (16, 600):
        rfm(make_rows(pairs=20, size=size), seed=0, options=RfmOptions(bandwidths=(10.0,)))
    assert used == ["xrfm"] * 2 + ["gram"] * 2


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_planted_direction_is_found(estimator):
    found = fit_direction(estimator, make_rows(pairs=200, size=64))
    assert found.vector[0] > (0.85 if estimator == "ridge" else 0.9)
    assert found.validation_r > 0.8


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_vectors_are_unit_and_point_towards_the_concept(estimator):
    rows = make_rows()
    found = fit_direction(estimator, rows)
    assert found.vector.dtype == np.float32
    assert np.linalg.norm(found.vector) == pytest.approx(1, abs=1e-5)
    assert pearson(rows.hidden @ found.vector, rows.labels) > 0


@pytest.mark.parametrize(
    ("estimator", "bound"),
    [("rfm", -0.85), ("ridge", -0.999999), ("pca", -0.999999), ("mean_difference", -0.999999)],
)
def test_flipped_labels_flip_the_vector(estimator, bound):
    rows = make_rows(signal=10.0)
    hard = rows.positive.astype(np.float32)
    found = fit_direction(estimator, LabelledRows("rows", rows.hidden, hard, rows.positive))
    flipped = fit_direction(estimator, LabelledRows("rows", rows.hidden, 1 - hard, ~rows.positive))
    # RFM has no intercept, so flipped labels are another regression of the same separation.
    assert found.vector @ flipped.vector < bound


def test_sign_follows_these_labels_whatever_the_eigenvector_was(monkeypatch):
    rows = make_rows()
    straight = fit_direction("rfm", rows)
    monkeypatch.setattr(
        "vllm_steer.offline.estimators.rfm.top_eigenvector",
        lambda matrix, seed: -top_eigenvector(matrix, seed),
    )
    np.testing.assert_array_equal(fit_direction("rfm", rows).vector, straight.vector)


def test_scale_and_offset_of_labels_do_not_matter_to_rfm():
    rows = make_rows()
    scaled = LabelledRows("rows", rows.hidden, rows.labels * 7 + 3, rows.positive)
    found = fit_direction("rfm", rows)
    assert fit_direction("rfm", scaled).vector @ found.vector > 1 - 1e-5


def test_scale_of_a_row_does_not_matter_to_rfm_but_to_the_mean():
    rows = make_rows()
    factor = np.random.default_rng(1).uniform(0.5, 2, (len(rows.labels), 1)).astype(np.float32)
    scaled = LabelledRows("rows", rows.hidden * factor, rows.labels, rows.positive)

    def cosine(estimator: str) -> float:
        found = [fit_direction(estimator, given).vector for given in (rows, scaled)]
        return float(found[0] @ found[1])

    assert cosine("rfm") > 1 - 1e-5
    assert cosine("mean_difference") < 0.999


def test_permuted_coordinates_permute_the_vector():
    rows = make_rows()
    order = np.random.default_rng(1).permutation(rows.hidden.shape[1])
    permuted = LabelledRows("rows", rows.hidden[:, order], rows.labels, rows.positive)
    found = fit_direction("rfm", rows).vector
    assert fit_direction("rfm", permuted).vector @ found[order] > 1 - 1e-6


def test_order_of_training_rows_and_a_common_offset_do_not_matter_to_the_matrices():
    rows = make_rows(pairs=40, size=12)
    states, labels = rows.hidden.astype(np.float64) / 10, rows.labels.astype(np.float64)
    expected = agop_matrices(states, labels, 64, 10.0)[-1].numpy()
    shifted = agop_matrices(states + 0.3, labels, 64, 10.0)[-1].numpy()
    np.testing.assert_allclose(shifted, expected, atol=1e-6)
    order = np.concatenate([np.random.default_rng(1).permutation(64), np.arange(64, 80)])
    permuted = agop_matrices(states[order], labels[order], 64, 10.0)[-1].numpy()
    np.testing.assert_allclose(permuted, expected, atol=1e-6)


def test_mean_difference_is_that_of_the_training_rows():
    rows = make_rows()
    train = split_point(len(rows.labels))
    hidden, positive = rows.hidden[:train], rows.positive[:train]
    expected = hidden[positive].mean(0) - hidden[~positive].mean(0)
    found = fit_direction("mean_difference", rows)
    np.testing.assert_allclose(found.vector, expected / np.linalg.norm(expected), atol=1e-6)


@pytest.mark.parametrize("size", [3, 40, 700])
def test_top_eigenvector_is_that_of_the_whole_decomposition(size):
    gradient = np.random.default_rng(0).standard_normal((60, size))
    matrix = gradient.T @ gradient
    found = top_eigenvector(matrix, seed=0)
    top = np.linalg.svd(gradient, full_matrices=False)[2][0]
    assert abs(found @ top) == pytest.approx(1, abs=1e-9)
    np.testing.assert_array_equal(found, top_eigenvector(matrix, seed=0))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fits_repeat_exactly_whatever_the_threads(estimator):
    rows = make_rows(pairs=100, size=48)
    first = fit_direction(estimator, rows, FitOptions(seed=3))
    torch.set_num_threads(2)
    try:
        second = fit_direction(estimator, rows, FitOptions(seed=3))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    np.testing.assert_array_equal(first.vector, second.vector)
    assert (first.validation_r, first.choice) == (second.validation_r, second.choice)


def test_ridge_is_the_primal_solution_of_the_best_strength():
    rows = make_rows(pairs=40, size=150, signal=1.0)
    train = split_point(len(rows.labels))
    x, y = centred_unit_rows(rows.hidden, train), rows.labels.astype(np.float64)
    y = y - y[:train].mean()
    errors, solutions = [], []
    for strength in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        primal = np.linalg.solve(
            x[:train].T @ x[:train] + strength * np.eye(150), x[:train].T @ y[:train]
        )
        solutions.append(primal / np.linalg.norm(primal))
        errors.append(np.square(x[train:] @ primal - y[train:]).mean())
    found = fit_direction("ridge", rows)
    np.testing.assert_allclose(found.vector, solutions[int(np.argmin(errors))], atol=1e-4)


def test_compat_leaves_rows_raw_and_has_no_intercept():
    rows = make_rows(pairs=40, size=30)
    train = split_point(len(rows.labels))
    x, y = rows.hidden[:train].astype(np.float64), rows.labels[:train].astype(np.float64)
    found = fit_direction("ridge", rows, FitOptions(compat=True))
    primal = np.linalg.solve(x.T @ x + found.choice["ridge"] * np.eye(30), x.T @ y)
    np.testing.assert_allclose(found.vector, primal / np.linalg.norm(primal), atol=1e-5)
    assert found.vector @ fit_direction("ridge", rows).vector < 0.999


@pytest.mark.parametrize("compat", [False, True])
def test_logistic_separates_the_prompts_and_wants_hard_labels(compat):
    rows = make_rows(pairs=100, size=30)
    hard = LabelledRows("rows", rows.hidden, rows.positive.astype(np.float32), rows.positive)
    found = fit_direction("logistic", hard, FitOptions(compat=compat))
    assert found.vector[0] > 0.8
    assert found.choice["inverse_strength"] in (1000.0, 10.0, 1.0, 0.1)
    assert np.linalg.norm(found.vector) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ExtractionError, match="rows: logistic regression needs hard labels"):
        fit_direction("logistic", rows)


def test_pca_is_the_uncentred_axis_of_paired_differences_whatever_their_signs():
    rows = make_rows(pairs=40, size=20)
    train = split_point(len(rows.labels))
    hidden, positive = rows.hidden[:train].astype(np.float64), rows.positive[:train]
    differences = hidden[positive] - hidden[~positive]
    signs = np.random.default_rng(1).choice([-1, 1], len(differences))[:, None]
    found = fit_direction("pca", rows).vector
    for given in (differences, signs * differences):
        assert abs(found @ np.linalg.svd(given)[2][0]) == pytest.approx(1, abs=1e-6)


FEW = ["rfm", "ridge", "logistic", "pca", "mean_difference"]


@pytest.mark.parametrize("pairs", [5, 9, 15])
@pytest.mark.parametrize("estimator", FEW)
def test_few_rows_choose_nothing_and_validate_nothing(estimator, pairs):
    """Two validation rows always correlate perfectly, and six choose among noise."""
    rows = make_rows(pairs=pairs, size=24, signal=0.0)
    hard = LabelledRows("rows", rows.hidden, rows.positive.astype(np.float32), rows.positive)
    found = fit_direction(estimator, hard)
    assert np.isnan(found.validation_r)
    assert (found.validation_rows, found.candidates) == (0, 1)
    default = {"bandwidth": 1.0, "normalise": True, "iteration": 9, "ridge": 1.0}
    default["inverse_strength"] = 1.0
    assert found.choice.items() <= default.items()
    # All rows are learned from: another last row is another direction.
    changed = hard.hidden.copy()
    changed[-1] *= -3
    again = fit_direction(estimator, LabelledRows("rows", changed, hard.labels, hard.positive))
    assert again.vector @ found.vector < 0.9999


@pytest.mark.parametrize(("estimator", "candidates"), [("rfm", 54), ("ridge", 6), ("pca", 1)])
def test_enough_rows_are_held_back_and_say_among_how_many_they_chose(estimator, candidates):
    found = fit_direction(estimator, make_rows(pairs=20, size=24))
    assert 0 < found.validation_r <= 1
    assert (found.validation_rows, found.candidates) == (8, candidates)


def test_few_rows_still_give_the_planted_direction():
    rows = make_rows(pairs=9, size=24, signal=6.0)
    ours, theirs = (
        fit_direction("rfm", rows, FitOptions(rfm=RfmOptions(solver=solver))) for solver in SOLVERS
    )
    assert ours.vector @ theirs.vector > 0.9999
    assert ours.vector[0] > 0.6


def test_rows_that_hold_no_direction_are_refused():
    rows = make_rows()
    zeros = np.zeros_like(rows.labels)
    cases = {
        "no attention": LabelledRows("rows", rows.hidden, zeros, rows.positive),
        "both prefixed and unprefixed": LabelledRows("rows", rows.hidden, rows.labels, zeros == 0),
        "too few": LabelledRows("rows", rows.hidden[:4], rows.labels[:4], rows.positive[:4]),
        "same mean": LabelledRows("rows", np.ones_like(rows.hidden), rows.labels, rows.positive),
    }
    for message, given in cases.items():
        with pytest.raises(ExtractionError, match=f"^rows: .*{message}"):
            fit_direction("mean_difference", given)
    with pytest.raises(ExtractionError, match="no RFM configuration"):
        fit_direction(
            "rfm", LabelledRows("rows", np.ones_like(rows.hidden), rows.labels, rows.positive)
        )


def test_pearson_is_numpys():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 30))
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert np.isnan(pearson(a, np.ones(30)))
