import math

import oracles
import pytest
import torch

from rlaif.maths.kl import AdaptiveKl, FixedKl, k1, k2, k3

PRINTED = 5e-7  # literals are typed with six decimals
FLOAT64 = 1e-12  # both sides are float64; only the order of a few additions differs

POLICY = [0.7, 0.2, 0.1]
REFERENCE = [0.5, 0.3, 0.2]
P = torch.tensor(POLICY, dtype=torch.float64)
Q = torch.tensor(REFERENCE, dtype=torch.float64)


def expectation(estimator):
    return (P * estimator(P.log() - Q.log())).sum().item()


def test_the_estimators_have_the_printed_expectations():
    assert expectation(k1) == pytest.approx(0.085123, abs=PRINTED)
    assert expectation(k2) == pytest.approx(0.080088, abs=PRINTED)
    assert expectation(k3) == pytest.approx(0.085123, abs=PRINTED)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    exact = oracles.kl_divergence(POLICY, REFERENCE)
    assert expectation(k1) == pytest.approx(exact, abs=FLOAT64)
    assert expectation(k3) == pytest.approx(exact, abs=FLOAT64)
    assert abs(expectation(k2) - exact) > 0.005


def test_single_values_of_the_estimators():
    log_ratio = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    assert k1(log_ratio).tolist() == [0.0, 1.0, -1.0]
    assert k2(log_ratio).tolist() == [0.0, 0.5, 0.5]
    assert k3(log_ratio).tolist() == pytest.approx([0.0, math.exp(-1), math.e - 2], abs=FLOAT64)


def test_k3_of_a_tiny_log_ratio_does_not_drown_in_rounding():
    # exp(-x) - 1 + x is x^2/2 - x^3/6 + ..., here 5e-9; in float32, exp(-x) - 1 alone is off by up to 6e-8
    assert k3(torch.tensor(1e-4)).item() == pytest.approx(5e-9, rel=0.01)


def expected_gradient(estimator):
    """Sum, over what the policy may sample, of the gradient of an estimator used as a loss."""
    total = torch.zeros(3, dtype=torch.float64)
    for token in range(3):
        logits = P.log().requires_grad_()
        estimator(torch.log_softmax(logits, dim=0)[token] - Q.log()[token]).backward()
        total += P[token] * logits.grad
    return total.tolist()


def exact_gradient(divergence):
    logits = P.log().requires_grad_()
    divergence(torch.softmax(logits, dim=0)).backward()
    return logits.grad.tolist()


def test_as_losses_the_estimators_have_the_gradients_the_docstring_claims():
    policy_to_reference = exact_gradient(lambda p: (p * (p.log() - Q.log())).sum())
    reference_to_policy = exact_gradient(lambda p: (Q * (Q.log() - p.log())).sum())
    assert expected_gradient(k1) == pytest.approx([0, 0, 0], abs=FLOAT64)
    assert expected_gradient(k2) == pytest.approx(policy_to_reference, abs=FLOAT64)
    assert expected_gradient(k3) == pytest.approx(reference_to_policy, abs=FLOAT64)


def test_the_adaptive_coefficient_follows_its_rule():
    controller = AdaptiveKl(0.2, target=6.0)
    controller.update(6.6)  # error .1: 0.2 * 1.01
    assert controller.coef == pytest.approx(0.202, abs=FLOAT64)
    controller.update(60.0)  # error 9, clipped to .2: 0.202 * 1.02
    assert controller.coef == pytest.approx(0.20604, abs=FLOAT64)
    controller.update(-1.0)  # clipped to -.2: 0.20604 * 0.98
    assert controller.coef == pytest.approx(0.2019192, abs=FLOAT64)


def test_the_adaptive_coefficient_rests_at_its_target():
    controller = AdaptiveKl(0.05, target=3.0)
    controller.update(3.0)
    assert controller.coef == 0.05


def test_the_adaptive_coefficient_equals_the_loop():
    measurements = [0.1, 5.0, 2.9, 3.2, 40.0, 2.0, 3.0]
    controller = AdaptiveKl(0.05, target=3.0, gain=0.3)
    for kl in measurements:
        controller.update(kl)
    assert controller.coef == pytest.approx(oracles.adaptive_kl(0.05, 3.0, 0.3, measurements), abs=FLOAT64)


def test_the_fixed_coefficient_never_moves():
    controller = FixedKl(0.05)
    controller.update(100.0)
    assert controller.coef == 0.05


@pytest.mark.parametrize("make", [lambda: FixedKl(0.05), lambda: AdaptiveKl(0.05, target=3.0)])
def test_a_coefficient_survives_a_checkpoint(make):
    controller, resumed = make(), make()
    for kl in (4.0, 3.1):
        controller.update(kl)
    resumed.load_state_dict(controller.state_dict())
    controller.update(2.0)
    resumed.update(2.0)
    assert resumed.coef == controller.coef


@pytest.mark.parametrize("controller", [FixedKl(0.05), AdaptiveKl(0.05, target=3.0)])
@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_measurement_that_is_not_finite_is_refused(controller, kl):
    with pytest.raises(ValueError, match="the policy has diverged"):
        controller.update(kl)
    assert controller.coef == 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 3.0), "coefficient is 0.0"),
        ((0.1, 0.0), "target is 0.0"),
        ((0.1, math.nan), "target is nan"),
        ((0.1, 3.0, 0.0), "gain is 0.0"),
        ((0.1, 3.0, 1.5), "gain is 1.5"),
    ],
)
def test_an_adaptive_coefficient_outside_its_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveKl(*arguments)


def test_a_negative_fixed_coefficient_is_refused_and_zero_is_not():
    assert FixedKl(0.0).coef == 0.0
    with pytest.raises(ValueError, match="coefficient is -0.1"):
        FixedKl(-0.1)
