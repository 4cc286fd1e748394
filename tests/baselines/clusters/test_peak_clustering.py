"""Density peak clustering and pair matching on points that can be worked out by hand, and on the golden ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers import golden
from vitprune_env.baselines.clusters.pair_matching import match_pairs
from vitprune_env.baselines.clusters.peak_clustering import density_peaks, nearest_of, peak_scores
from vitprune_env.policy import mean_weights

INF = float("inf")


def squared(points: Tensor) -> Tensor:
    """Squared distances of `[M, C]`, one by one, `[1, M, M]`."""
    return (points[:, None] - points[None]).square().sum(dim=2)[None]


def test_golden_points() -> None:
    file = golden("dpc_points")
    distances, channels = squared(file["points"].double()), file["points"].shape[1]
    scores = peak_scores(distances, channels, neighbours=5)
    torch.testing.assert_close(scores[0], file["knn_nearest_logscore"], atol=1e-9, rtol=0)
    wanted, assign = file["knn_nearest_centers"], file["knn_nearest_assign"]
    centres, nearest = density_peaks(distances, torch.tensor([len(wanted)]), channels)
    assert centres[0].nonzero()[:, 0].tolist() == sorted(wanted.tolist())
    assert torch.equal(nearest[0], wanted[assign])


def test_scores_by_hand() -> None:
    # Two neighbours (itself and one more) of points on a line: mean d^2 is 1/2, 1/2, 4/2, 9/2.
    distances = squared(torch.tensor([[0.0], [1.0], [3.0], [6.0]]))
    distances[0, 0, 1] = distances[0, 1, 0] = 0.81  # the points 0 and 1 a little closer, lest they tie with others
    distances[0, 1, 2] = distances[0, 2, 1] = 3.61
    density = [-0.81 / 2, -0.81 / 2, -3.61 / 2, -9 / 2]
    separation = [6.0, 5.0, 1.9, 3.0]  # 0 and 1 tie: no denser point, so the farthest one; 2 to 1; 3 to 2
    expected = [rho + math.log(delta) for rho, delta in zip(density, separation, strict=True)]
    torch.testing.assert_close(peak_scores(distances, channels=1, neighbours=2)[0], torch.tensor(expected))
    centres, nearest = density_peaks(distances, torch.tensor([2]), channels=1, neighbours=2)
    assert centres[0].tolist() == [True, True, False, False]
    assert nearest[0].tolist() == [0, 1, 1, 1]


def test_density_divides_by_the_width() -> None:
    distances = squared(torch.tensor([[0.0], [1.0], [5.0]]))
    one, four = (peak_scores(distances, channels, neighbours=2)[0, 0] for channels in (1, 4))
    torch.testing.assert_close(one, torch.tensor(-0.5 + math.log(5)))
    torch.testing.assert_close(four, torch.tensor(-0.125 + math.log(5)))


def test_absent_points_change_nothing() -> None:
    points = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    alone = density_peaks(squared(points), torch.tensor([3]), channels=4)
    padded = torch.full((1, 12, 12), INF)
    padded[:, :9, :9] = squared(points)
    centres, nearest = density_peaks(padded, torch.tensor([3]), channels=4)
    assert torch.equal(centres[:, :9], alone[0])
    assert not centres[:, 9:].any()
    assert torch.equal(nearest[:, :9], alone[1])


def test_fewer_points_than_neighbours() -> None:
    scores = peak_scores(squared(torch.tensor([[0.0], [2.0]])), channels=1, neighbours=5)
    torch.testing.assert_close(scores, torch.full((1, 2), -2 + math.log(2)))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_coinciding_points_are_still_clustered(count: int) -> None:
    padded = torch.full((1, 4, 4), INF)
    padded[:, :3, :3] = 0
    centres, nearest = density_peaks(padded, torch.tensor([count]), channels=2)
    assert centres[0].tolist() == [True] * count + [False] * (4 - count)
    assert nearest[0, :count].tolist() == list(range(count)), "a centre is its own"


def test_nearest_of_by_hand() -> None:
    distances = squared(torch.tensor([[0.0], [1.0], [3.0], [6.0]]))
    assert nearest_of(distances, torch.tensor([[True, False, True, False]]))[0].tolist() == [0, 0, 2, 2]
    assert nearest_of(distances, torch.tensor([[False, True, False, True]]))[0].tolist() == [1, 1, 1, 3]


def test_pairs_are_greedy_and_disjoint() -> None:
    table = torch.tensor(
        [
            [9.0, 0.8, 0.7, 0.1, 0.0],
            [0.8, 9.0, 0.9, 0.2, 0.0],
            [0.7, 0.9, 9.0, 0.6, 0.0],
            [0.1, 0.2, 0.6, 9.0, 0.3],
            [0.0, 0.0, 0.0, 0.3, 9.0],
        ]
    )
    similarity, valid = table.expand(4, 5, 5), torch.ones(4, 5, dtype=torch.bool)
    valid[3, 1] = False
    partner = match_pairs(similarity, valid, torch.tensor([0, 1, 2, 2]), most=2)
    assert partner.tolist() == [[0, 1, 2, 3, 4], [0, 2, 1, 3, 4], [0, 2, 1, 4, 3], [2, 1, 0, 4, 3]]


def test_mean_weights_by_hand() -> None:
    merge_into = torch.tensor([[0, 0, 2, -1, 4, 4]])
    importance = torch.tensor([[0.1, 0.3, 0.02, 5.0, 0.0, 0.0]])
    weight = mean_weights(merge_into, importance)
    torch.testing.assert_close(weight, torch.tensor([[0.25, 0.75, 1.0, 1.0, 0.5, 0.5]]))


def test_mean_weights_have_gradients_where_nobody_stays() -> None:
    importance = torch.rand(2, 3, requires_grad=True)
    mean_weights(torch.tensor([[-1, -1, -1], [-1, 2, 2]]), importance).square().sum().backward()
    assert importance.grad is not None
    assert torch.isfinite(importance.grad).all()
    assert importance.grad[1, 1:].any()
