"""The truth that many annotators' labels point to together, and how often each of them says it.

Plain numbers and arrays; no torch. `n` items, `A` annotators, `K` classes, `m` labels.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
_LEAST = 1e-10  # of a probability, so that one label against it leaves no item without a truth


class Consensus(NamedTuple):
    """What the labels of all annotators together say.

    Attributes:
        posterior: `[n, K]`, the probability that an item is of a class.
        errors: `[A, K, K]`, the probability that an annotator says the last class of an item of the one before.
        prior: `[K]`, the share of items of a class.
    """

    posterior: Floats
    errors: Floats
    prior: Floats

    @property
    def skill(self) -> Floats:
        """`[A]`, the probability that an annotator names the true class."""
        skill: Floats = np.einsum("k,akk->a", self.prior, self.errors)
        return skill


def dawid_skene(
    items: ArrayLike,
    annotators: ArrayLike,
    labels: ArrayLike,
    classes: int,
    *,
    known: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    alike: bool = False,
    strength: float = 0.0,
    iterations: int = 100,
    tolerance: float = 1e-5,
) -> Consensus:
    """Estimate the true classes of items and the error rates of annotators by expectation and maximization.

    Dawid and Skene 1979, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm". It begins with
    the shares of the labels, so that the majority decides which of two mirrored solutions is found.

    Args:
        items: `[m]`, the item of each label, from 0.
        annotators: `[m]`, who gave it, from 0.
        labels: `[m]`, the class it names, from 0.
        classes: `K`.
        known: `[n]`, the true class of an item, -1 where it is not known; None: none is.
        groups: `[A]`, from 0: annotators of one group are expected to be about equally good, and groups to be more or
            less so. None: there is one group. Those who gave no label of an item may stand here too.
        alike: the classes mean the same, as the sides of a pair in an order without meaning: each has the same share,
            and an annotator has one chance to be right and errs to all others alike.
        strength: how many labels the average of the group counts beside an annotator's own, so that a few labels do
            not make a perfect annotator. Used where `alike`.
        iterations: the most steps.
        tolerance: the largest change of a posterior at which to stop.

    Raises:
        ValueError: there is no label, the lengths differ, or a number is out of range.
    """
    item, who, said = (np.asarray(one, dtype=np.int64) for one in (items, annotators, labels))
    if item.ndim != 1 or not item.size or item.shape != who.shape or item.shape != said.shape:
        raise ValueError(f"{item.size} items, {who.size} annotators and {said.size} labels; as many of each, and some")
    if classes < 2 or min(item.min(), who.min(), said.min()) < 0 or said.max() >= classes:
        raise ValueError(f"labels from {said.min()} to {said.max()}; classes from 0 to {classes - 1} are expected")
    n = int(item.max()) + 1
    truth = np.full(n, -1) if known is None else np.asarray(known, dtype=np.int64)
    group = np.zeros(int(who.max()) + 1, dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64)
    count = len(group)
    if truth.shape != (n,) or truth.max() >= classes or count <= who.max() or group.min() < 0:
        raise ValueError(f"known {truth.shape}, groups {group.shape}; one for each of {n} items and each annotator")
    of = _Labels(item, who, said, np.bincount(who, minlength=count).astype(np.float64), group)
    posterior = np.zeros((n, classes))
    np.add.at(posterior, (item, said), 1.0)
    posterior = _fixed(posterior / np.maximum(1.0, posterior.sum(1, keepdims=True)), truth)
    for _ in range(iterations):
        errors, prior = _alike(posterior, of, strength) if alike else _each(posterior, of)
        logs = np.tile(np.log(prior), (n, 1))
        np.add.at(logs, item, np.log(errors)[who, :, said])
        before, posterior = posterior, _fixed(softmax(logs, axis=1), truth)
        if np.abs(posterior - before).max() < tolerance:
            break
    return Consensus(posterior, errors, prior)


class _Labels(NamedTuple):
    item: Integers
    who: Integers
    said: Integers
    given: Floats  # `[A]`, how many labels an annotator gave
    group: Integers


def _fixed(posterior: Floats, truth: Integers) -> Floats:
    """Put what is known in the place of what is estimated."""
    known = truth >= 0
    posterior[known] = np.eye(posterior.shape[1])[truth[known]]
    return posterior


def _each(posterior: Floats, of: _Labels) -> tuple[Floats, Floats]:
    """Return the error rates and the shares of classes that are most likely, each class for itself."""
    classes = posterior.shape[1]
    errors = np.zeros((len(of.given), classes, classes))
    for said in range(classes):
        own = of.said == said
        np.add.at(errors[:, :, said], of.who[own], posterior[of.item[own]])
    errors, prior = np.maximum(errors, _LEAST), np.maximum(posterior.mean(0), _LEAST)
    return errors / errors.sum(2, keepdims=True), prior / prior.sum()


def _alike(posterior: Floats, of: _Labels, strength: float) -> tuple[Floats, Floats]:
    """Return the error rates that are most likely where all classes are alike, and equal shares of them."""
    count, classes = len(of.given), posterior.shape[1]
    right = np.bincount(of.who, posterior[of.item, of.said], minlength=count)
    mean = right.sum() / of.given.sum()
    own_right, own_given = np.bincount(of.group, right), np.bincount(of.group, of.given)
    of_group = (own_right + strength * mean) / np.maximum(_LEAST, own_given + strength)
    skill = (right + strength * of_group[of.group]) / np.maximum(_LEAST, of.given + strength)
    skill = np.clip(skill, _LEAST, 1 - _LEAST)
    errors = np.tile(((1 - skill) / (classes - 1))[:, None, None], (1, classes, classes))
    errors[:, range(classes), range(classes)] = skill[:, None]
    return errors, np.full(classes, 1 / classes)
