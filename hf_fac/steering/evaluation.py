"""How far a steering vector changes a model's answers to questions with two choices. In: a vector and contrastive rows.
Out: robust accuracy against, without and with the vector, and the steering control rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..inputs.additions import PromptCache, addition
from ..inputs.hidden_states import evaluation_mode, most_logit_tokens
from ..inputs.rows import as_rows
from .choices import LetterPair, exchanged, letter_pairs
from .vectors import SteeringVector

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class SteeringEvaluation:
    """A model's answers with the vector at -multiplier, 0 and multiplier; the lists below have this order.

    multiplier: of the vector.
    log_odds: float64 [3, n, 2], log-likelihood of the matching answer's letter less that of the other's, of n items in
        both orders of their choices.
    """

    multiplier: float
    log_odds: np.ndarray

    @property
    def accuracy(self) -> list[float]:
        """Robust accuracy: the share of items whose matching answer is likelier in both orders of the choices."""
        return self._robust.mean(axis=1).tolist()

    @property
    def probability(self) -> list[float]:
        """The mean probability of the matching answer's letter, of both letters."""
        return (1 / (1 + np.exp(-self.log_odds))).mean(axis=(1, 2)).tolist()

    @property
    def control_rate(self) -> float:
        """The steering control rate: robust accuracy at multiplier less that at -multiplier."""
        return self.accuracy[2] - self.accuracy[0]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the control rate, over items."""
        return _paired_interval(self._robust[2], self._robust[0])

    @property
    def _robust(self) -> np.ndarray:
        return (self.log_odds > 0).all(axis=2)

    def __str__(self) -> str:
        low, high = self.interval
        lines = [
            f"steering control rate {self.control_rate:.1%} (95 % interval {low:.1%} to {high:.1%}), "
            f"{self.log_odds.shape[1]} items",
            "multiplier  robust accuracy  probability of the matching answer",
        ]
        for sign, accuracy, probability in zip((-1, 0, 1), self.accuracy, self.probability, strict=True):
            lines.append(f"{sign * self.multiplier:10g}  {accuracy:15.1%}  {probability:34.1%}")
        return "\n".join(lines)


def evaluate_steering(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    rows: Iterable[Any],
    *,
    multiplier: float = 1.0,
) -> SteeringEvaluation:
    """Returns how the model answers contrastive rows with the vector at -multiplier, 0 and multiplier.

    Each row is read in both orders of its choices. The answer is the letter with the higher log-likelihood after the
    prompt and what stands before the letter; "chosen" is the matching one.

    Args:
        rows: held-out contrastive rows, of the form that `SteeringVector.from_rows` takes.

    Raises: RowError for a row of another form; ValueError without rows; what `SteeringVector.applied` raises.
    """
    rows = list(as_rows(rows))
    if not rows:
        raise ValueError("There are no rows: an evaluation needs at least one contrastive row.")
    both = [order for number, row in enumerate(rows) for order in (row, exchanged(row, number))]
    pairs = letter_pairs(tokenizer, both)
    vector.check(model)
    vectors = torch.outer(torch.tensor([-multiplier, 0.0, multiplier]), vector.vector)
    log_odds = np.empty((3, len(pairs)))
    with evaluation_mode(model):
        for batch in _equal_sizes(pairs, most_logit_tokens(model)):
            log_odds[:, batch] = _log_odds(model, [pairs[i] for i in batch], vector.layer, vectors)
    return SteeringEvaluation(multiplier, log_odds.reshape(3, len(rows), 2))


def _equal_sizes(pairs: list[LetterPair], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of pairs that need no padding: their prompts have as many tokens, and so has what follows them."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault((len(pair.ids), pair.prompt_tokens), []).append(i)
    for (length, _), group in groups.items():
        n = max(1, batch_tokens // length)
        yield from (group[start : start + n] for start in range(0, len(group), n))


def _log_odds(model: PreTrainedModel, pairs: list[LetterPair], layer: int, vectors: Tensor) -> np.ndarray:
    """log p(chosen) - log p(rejected), which is the difference of their logits, with each vector: [vectors, pairs]."""
    ids = torch.tensor([pair.ids for pair in pairs], device=model.device)
    prompt_tokens, n = pairs[0].prompt_tokens, len(vectors)
    cache, before = PromptCache(config=model.config), prompt_tokens - 1
    if before:  # these tokens are not steered: they are read once for all vectors
        model(input_ids=ids[:, :before], past_key_values=cache, use_cache=True)
    cache.reads_prompt = False
    cache.batch_repeat_interleave(n)
    with addition(model, layer, vectors.repeat(len(pairs), 1), prompt_tokens=prompt_tokens):
        rest = ids[:, before:].repeat_interleave(n, dim=0)
        logits = model(input_ids=rest, past_key_values=cache, use_cache=True).logits[:, -1]
    letters = torch.tensor([[pair.chosen, pair.rejected] for pair in pairs], device=model.device)
    found = logits.gather(-1, letters.repeat_interleave(n, dim=0)).double().cpu()
    return (found[:, 0] - found[:, 1]).reshape(len(pairs), n).T.numpy()


def _paired_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """The 95 % score interval of the mean of `first` less that of `second`, bool [n] each, of the same items (Newcombe
    1998, Statistics in Medicine 17:2635, method 10). It holds at rates of 0 and 1 too, where a bootstrap has no width.
    """
    from scipy.stats import binomtest

    n, p, q = len(first), first.mean(), second.mean()
    (p_low, p_high), (q_low, q_high) = (
        binomtest(int(one.sum()), n).proportion_ci(method="wilson") for one in (first, second)
    )
    covariance = (first & second).mean() - p * q
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * n))
    spread = math.sqrt(p * (1 - p) * q * (1 - q))
    correlation = covariance / spread if spread else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(a * a - 2 * correlation * a * b + b * b)

    return float(p - q - distance(p - p_low, q_high - q)), float(p - q + distance(p_high - p, q - q_low))
