"""The maths against the obvious, slow way of writing it."""

import pytest
import torch
from trl.trainer.utils import nanstd

from trl_learnalign.scores import maths as scoring


def naive_scores(features, learnability):
    """Eq. 8 as it stands: an n x n matrix, one pair at a time, and its row means."""
    n = len(features)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            if features[i].norm() > 0 and features[j].norm() > 0:
                a, b = features[i].double(), features[j].double()
                matrix[i, j] = learnability[i] * learnability[j] * (a @ b) / (a.norm() * b.norm())
    return matrix.mean(1)


def fast_scores(features, weights):
    total = torch.zeros(features.shape[1], dtype=torch.float64)
    for rows in torch.arange(len(features)).split(7):
        scoring.add_unit_features(total, features[rows], weights[rows])
    return scoring.scores_from_mean(features, weights, total / len(features))[:2]


def test_scores_equal_the_matrix_of_eq_8():
    torch.manual_seed(0)
    features = torch.randn(40, 5000) * torch.logspace(-3, 3, 40)[:, None] + 0.3
    features[[3, 17]] = 0.0
    learnability = torch.rand(40, dtype=torch.float64) * 0.25
    learnability[[3, 5]] = 0.0
    scores, alignments = fast_scores(features, learnability)
    torch.testing.assert_close(scores, naive_scores(features, learnability), rtol=1e-5, atol=1e-9)
    assert scores[3] == scores[5] == scores[17] == 0.0
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    mean = (learnability[:, None] * unit).mean(0)
    torch.testing.assert_close(alignments, torch.cosine_similarity(features.double(), mean[None], dim=1))
    assert alignments.abs().max() <= 1.0


def test_scores_do_not_depend_on_the_order_of_prompts():
    torch.manual_seed(1)
    features, learnability = torch.randn(30, 16), torch.rand(30)
    order = torch.randperm(30)
    scores, _ = fast_scores(features, learnability)
    shuffled, _ = fast_scores(features[order], learnability[order])
    torch.testing.assert_close(shuffled, scores[order])


def test_opposite_gradients_cancel_without_nan():
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    scores, alignments = fast_scores(features, torch.tensor([0.25, 0.25]))
    assert scores.tolist() == [0.0, 0.0] and alignments.tolist() == [0.0, 0.0]


def test_success_rate_leaves_out_unscorable_rollouts():
    nan = torch.nan
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [nan, 1.0, nan, 0.5], [nan] * 4, [1.0, 2.0, 1.0, 1.0]])
    rates = scoring.success_rates(rewards, 1.0)
    assert rates[:2].tolist() == [0.5, 0.5] and rates[2].isnan() and rates[3] == 1.0
    assert scoring.learnability(rates)[3] == 0.0


def test_variance_of_binary_rewards_is_p_times_one_minus_p():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [torch.nan, 1.0, 1.0, 0.0]])
    expected = scoring.learnability(scoring.success_rates(rewards, 1.0))
    torch.testing.assert_close(scoring.reward_variance(rewards), expected)


def test_variance_is_scaled_to_the_range_of_the_pool():
    rewards = torch.tensor([[-10.0, 30.0], [10.0, 10.0], [torch.nan, torch.nan]])
    variance = scoring.reward_variance(rewards)
    assert variance[:2].tolist() == [0.25, 0.0] and variance[2].isnan()
    equal = scoring.reward_variance(torch.tensor([[1.0, 1.0], [torch.nan, torch.nan]]))
    assert equal[0] == 0.0 and equal[1].isnan() and equal.dtype == variance.dtype == torch.float64


@pytest.mark.parametrize("size", [3, 5, 7, 8, 12])
def test_equal_rewards_have_no_variance_at_all(size):
    """Odd groups, and groups without one of their rewards: the mean of equal numbers may be off in the last digit."""
    rewards = (torch.arange(1, 50) / 49)[:, None].repeat(1, size)
    rewards[::2, 0] = torch.nan
    rewards[-1, -1] = 2.0
    variance = scoring.reward_variance(rewards)
    assert (variance[:-1] == 0.0).all() and variance[-1] > 0


def test_choice_never_fills_up_with_unlearnable_prompts():
    scores = torch.tensor([0.0, -0.5, 0.3, 0.3, 0.0])
    learnability = torch.tensor([0.0, 0.1, 0.2, 0.2, 0.0])
    ranked = {tuple(scoring.ranking(scores, learnability, seed)) for seed in range(30)}
    assert ranked == {(*best, 1, *last) for best in ((2, 3), (3, 2)) for last in ((0, 4), (4, 0))}


def test_values_that_differ_by_rounding_are_ties():
    """With five rollouts p (1 - p) of 1/5 and of 4/5 are not the same number."""
    values = scoring.learnability(torch.tensor([1, 4] * 100, dtype=torch.float64) / 5)
    assert values[0] != values[1]
    for scale in (1.0, 1e-9):
        head = scoring.ranking(values * scale, values, 0)[:100]
        assert 30 < sum(place % 2 for place in head) < 70


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_advantages_point_where_those_of_trl_do(scale, aggregation):
    """Against TRL's formulas, one group at a time; the scale of a group is checked where TRL's is by group."""
    torch.manual_seed(2)
    rewards = (torch.rand(5, 8, 2) > 0.5).float()
    rewards[0, 0] = torch.nan  # unscorable
    rewards[1, 2, 1] = torch.nan  # scored by one function only
    weights = torch.tensor([1.0, 0.5])
    ours = scoring.advantages(rewards, weights, scale, aggregation)
    for group, advantage in zip(rewards, ours, strict=True):
        if aggregation == "normalize_then_sum":
            std = nanstd(group[None], dim=1, keepdim=True)[0]
            group = (group - group.nanmean(0, keepdim=True)) / (std + 1e-4)
        total = (group * weights).nansum(1)
        total[group.isnan().all(1)] = torch.nan
        expected = total - total.nanmean()
        if scale == "group" and aggregation == "sum_then_normalize":
            expected = expected / (nanstd(total[None], dim=1) + 1e-4)
            torch.testing.assert_close(advantage, expected.nan_to_num(0.0).double(), rtol=1e-4, atol=1e-5)
        expected = expected.nan_to_num(0.0).double()
        assert torch.cosine_similarity(advantage, expected, dim=0) > 1 - 1e-6 or expected.norm() < 1e-6
