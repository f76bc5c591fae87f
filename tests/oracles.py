"""The equations once more, as slow loops over plain lists.

Written from the papers' equations, not from the code under test: nothing here imports `rlaif` or torch.
Rows are lists, masks are lists of bools, True keeps.
"""

import itertools
import math
from statistics import NormalDist


def mean(x, mask):
    kept = [value for value, keep in zip(x, mask, strict=True) if keep]
    return sum(kept) / len(kept)


def biased_variance(x, mask):
    center = mean(x, mask)
    return mean([(value - center) ** 2 for value in x], mask)


def whiten(x, mask, center=True):
    average, spread = mean(x, mask), math.sqrt(biased_variance(x, mask) + 1e-8)
    back = 0.0 if center else average
    return [(value - average) / spread + back if keep else 0.0 for value, keep in zip(x, mask, strict=True)]


def response_mask(ids, eos_ids):
    """Walk a response and stop after the first end token."""
    kept = []
    for token in ids:
        kept.append(True)
        if token in eos_ids:
            break
    return kept + [False] * (len(ids) - len(kept))


def token_rewards(score, logprobs, ref_logprobs, length, kl_coef):
    """One response of `length` tokens in a row of len(logprobs) columns."""
    rewards = [0.0] * len(logprobs)
    for t in range(length):
        rewards[t] = -kl_coef * (logprobs[t] - ref_logprobs[t])
    rewards[length - 1] += score
    return rewards


def gae(rewards, values, gamma, lam):
    """The double sum, for one response without padding: no recursion."""
    n = len(rewards)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    advantages = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def leave_one_out(returns):
    """RLOO, for the responses to one prompt."""
    return [r - sum(returns[:i] + returns[i + 1 :]) / (len(returns) - 1) for i, r in enumerate(returns)]


def group_deviations(returns):
    """Dr. GRPO's and GRPO's advantages, for the responses to one prompt."""
    average = sum(returns) / len(returns)
    spread = math.sqrt(sum((r - average) ** 2 for r in returns) / (len(returns) - 1))
    return [r - average for r in returns], [(r - average) / spread for r in returns]


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


def bradley_terry(chosen, rejected, preference=1.0, margin=0.0):
    """Cross-entropy of a coin with P(heads) = `preference`; fine for small differences only."""
    likelihood = sigmoid(chosen - rejected - margin)
    return -(preference * math.log(likelihood) + (1.0 - preference) * math.log(1.0 - likelihood))


def ranking_loss(scores, ranks):
    pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    return sum(bradley_terry(scores[i], scores[j]) for i, j in pairs) / len(pairs)


def plackett_luce(scores, ranks):
    """The best response is drawn from all, the next from those that are left, and so on."""
    left, likelihood = dict(zip(ranks, scores, strict=True)), 1.0
    while left:
        best = left[min(left)]
        likelihood *= math.exp(best) / sum(math.exp(score) for score in left.values())
        del left[min(left)]
    return -math.log(likelihood)


def cost_loss(worse_cost, better_cost, worse_sign, better_sign):
    likelihood = sigmoid(worse_cost - better_cost)
    for cost, sign in ((worse_cost, worse_sign), (better_cost, better_sign)):
        likelihood *= sigmoid(cost) if sign > 0 else 1 - sigmoid(cost)
    return -math.log(likelihood)


def nll(gaps, preferences):
    return sum(bradley_terry(gap, 0.0, p) for gap, p in zip(gaps, preferences, strict=True)) / len(gaps)


def ece(gaps, preferences, bins):
    """Walk over the bins; each pair is seen from the side that the model prefers."""
    total = 0.0
    for number in range(bins):
        low, high = 0.5 + number / (2 * bins), 0.5 + (number + 1) / (2 * bins)
        inside = []
        for gap, p in zip(gaps, preferences, strict=True):
            sure = max(sigmoid(gap), sigmoid(-gap))
            if low <= sure < high or (number == bins - 1 and sure == high):
                inside.append((sure, p if gap > 0 else 1 - p))
        total += abs(sum(right for _, right in inside) - sum(sure for sure, _ in inside))
    return total / len(gaps)


def ranks(x):
    """Mean of the places that equal values take."""
    ordered = sorted(x)
    return [ordered.index(value) + 1 + (ordered.count(value) - 1) / 2 for value in x]


def pearson(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    together = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return together / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """Loss, ratio, clip fraction, KL to old: means over kept tokens of all rows laid end to end."""
    losses, ratios, clipped, kl = [], [], [], []
    for new, old, advantage in zip(logprobs, old_logprobs, advantages, strict=True):
        ratio = math.exp(new) / math.exp(old)
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        losses.append(-min(ratio * advantage, bounded * advantage))
        ratios.append(ratio)
        clipped.append(1.0 if bounded * advantage < ratio * advantage else 0.0)
        kl.append((new - old) ** 2 / 2)
    return mean(losses, mask), mean(ratios, mask), mean(clipped, mask), mean(kl, mask)


def clipped_value_loss(values, old_values, returns, mask, clip):
    losses, clipped = [], []
    for value, old, target in zip(values, old_values, returns, strict=True):
        bounded = min(max(value, old - clip), old + clip)
        losses.append(0.5 * max((value - target) ** 2, (bounded - target) ** 2))
        clipped.append(1.0 if (bounded - target) ** 2 > (value - target) ** 2 else 0.0)
    return mean(losses, mask), mean(clipped, mask)


def entropy(logits):
    weights = [math.exp(logit) for logit in logits]
    probabilities = [weight / sum(weights) for weight in weights]
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def explained_variance(values, returns, mask):
    missed = [target - value for value, target in zip(values, returns, strict=True)]
    return 1.0 - biased_variance(missed, mask) / biased_variance(returns, mask)


def kl_divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def adaptive_kl(coef, target, gain, measurements):
    for kl in measurements:
        error = kl / target - 1
        if error > 0.2:
            error = 0.2
        if error < -0.2:
            error = -0.2
        coef = coef * (1 + gain * error)
    return coef


def swapped_preference(strength, bias, space):
    """Simulate a judge with a known strength and bias, then average over its two answers."""
    first_shown_wins_when_a_is_first = sigmoid(strength + bias)
    first_shown_wins_when_b_is_first = sigmoid(-strength + bias)
    a, also_a = first_shown_wins_when_a_is_first, 1 - first_shown_wins_when_b_is_first
    if space == "probability":
        return (a + also_a) / 2
    odds = math.sqrt(a / (1 - a) * also_a / (1 - also_a))  # the geometric mean of odds is the mean of logits
    return odds / (1 + odds)


def wilson(count, n, confidence):
    """Invert the score test by bisection: the p at which |count/n - p| = z * sqrt(p (1 - p) / n)."""
    z, rate = NormalDist().inv_cdf(0.5 + confidence / 2), count / n

    def solve(inside, outside):
        for _ in range(200):
            middle = (inside + outside) / 2
            if abs(rate - middle) <= z * math.sqrt(middle * (1 - middle) / n):
                inside = middle
            else:
                outside = middle
        return inside

    return solve(rate, 0.0), solve(rate, 1.0)


def every_resampled_mean(differences):
    """The exact bootstrap distribution: all n^n resamples, sorted; for a handful of numbers."""
    n = len(differences)
    return sorted(sum(draw) / n for draw in itertools.product(differences, repeat=n))


def auroc(scores, positive):
    """The share of all pairs of a positive and a negative row in which the positive one is higher; half for a tie."""
    ones = [score for score, kind in zip(scores, positive, strict=True) if kind]
    zeros = [score for score, kind in zip(scores, positive, strict=True) if not kind]
    return sum((a > b) + 0.5 * (a == b) for a in ones for b in zeros) / (len(ones) * len(zeros))
