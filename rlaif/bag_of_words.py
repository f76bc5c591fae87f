"""A Bradley-Terry model on words: what a reward model should know better than.

The score of an answer is linear in which words and pairs of words it holds. A prompt's words cancel between the answers
of a pair, so this model cannot read the prompt at all.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit

_TOKEN = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
RIDGE = 50.0  # over the summed loss; five folds of 1,164 hh-rlhf pairs: 10 gives .583, 50 .608, 100 .603
_SEEN_IN = 2  # answers that hold a feature, at least


class BagOfWords(NamedTuple):
    """Weights of words and pairs of words."""

    columns: dict[str, int]
    weights: NDArray[np.float64]

    def scores(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the score of each text, ``[n]``."""
        return np.asarray(_matrix(texts, self.columns) @ self.weights, dtype=np.float64)


def fit(chosen: Sequence[str], rejected: Sequence[str], preferences: Sequence[float]) -> BagOfWords:
    """Fit the weights by the soft Bradley-Terry likelihood with a ridge penalty, which is convex.

    Args:
        chosen: the better answers, ``[n]``.
        rejected: the worse answers, ``[n]``.
        preferences: P(chosen is better), ``[n]``.
    """
    seen = Counter(feature for text in (*chosen, *rejected) for feature in features(text))
    columns = {name: index for index, name in enumerate(sorted(n for n, count in seen.items() if count >= _SEEN_IN))}
    if not columns:
        return BagOfWords({}, np.zeros(0))
    x = csr_array(_matrix(chosen, columns) - _matrix(rejected, columns))
    p = np.asarray(preferences, dtype=np.float64)

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        gap = x @ weights
        value = np.mean(np.logaddexp(0, gap) - p * gap) + RIDGE / 2 * weights @ weights / len(p)
        return float(value), np.asarray(x.T @ (expit(gap) - p) / len(p) + RIDGE * weights / len(p))

    found = minimize(loss, np.zeros(len(columns)), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return BagOfWords(columns, np.asarray(found.x, dtype=np.float64))


def features(text: str) -> set[str]:
    """Return the words of a text and the pairs of neighbours, each once, in lower case."""
    words = _TOKEN.findall(text.lower())
    return {*words, *(f"{a} {b}" for a, b in zip(words, words[1:], strict=False))}


def _matrix(texts: Sequence[str], columns: dict[str, int]) -> csr_array:
    places = [sorted(columns[name] for name in features(text) if name in columns) for text in texts]
    starts = np.cumsum([0, *map(len, places)])
    flat = np.array([column for row in places for column in row], dtype=np.int64)
    return csr_array((np.ones(len(flat)), flat, starts), shape=(len(texts), len(columns)))
