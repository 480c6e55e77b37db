"""Beam search over one prompt, as transformers' `generate` does it (its `_beam_search` of version 5).

The device tells each beam's likeliest tokens; which beams go on is decided here, on the host.
"""

from __future__ import annotations

import numpy as np

_NEVER = -1e9  # a score that no sequence has


class BeamSearch:
    """The beams of one prompt.

    Args:
      beams: how many go on at a time.
      stop: ids that end an answer; they count into its length.
      max_new_tokens: an answer of so many tokens is finished as it is.
      length_penalty: an answer's score is the sum of its log probabilities over its length to this power.
      early_stopping: end as soon as there are `beams` finished answers; otherwise only when the best beam's score, at
        its present length, is no more above that of the worst of them.
    """

    def __init__(
        self, beams: int, stop: frozenset[int], max_new_tokens: int, length_penalty: float, early_stopping: bool
    ):
        self.beams, self.stop, self.max_new_tokens = beams, stop, max_new_tokens
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self._kept = max(2, 1 + len(stop)) * beams
        self._scores = np.array([0.0] + [_NEVER] * (beams - 1), np.float32)
        self._sequences: list[list[int]] = [[] for _ in range(beams)]
        self._finished = [(np.float32(_NEVER), False, [])] * beams  # score, whether it is one, ids; the best first
        self._improvable = True
        self.done = False

    @property
    def last_tokens(self) -> list[int]:
        """The newest token of every beam."""
        return [sequence[-1] for sequence in self._sequences]

    @property
    def best(self) -> list[int]:
        """The ids of the best finished answer, without the id that ended it."""
        tokens = self._finished[0][2]
        return tokens[:-1] if tokens and tokens[-1] in self.stop else tokens

    @property
    def best_stopped(self) -> bool:
        """Whether the best answer ended by itself rather than by its length."""
        tokens = self._finished[0][2]
        return bool(tokens) and tokens[-1] in self.stop

    def advance(self, likeliest: np.ndarray, log_probabilities: np.ndarray) -> list[int]:
        """One step: int32[beams, N] and float32[beams, N] of the beams' next tokens, the likeliest first.

        Returns:
          For every beam that goes on the one before it whose past it continues.
        """
        sums = self._scores[:, None] + log_probabilities.astype(np.float32)
        order = np.argsort(-sums, axis=None, kind="stable")[: self._kept]
        parents, places = np.unravel_index(order, sums.shape)
        scores, ids = sums[parents, places], likeliest[parents, places]
        sequences = [[*self._sequences[parent], int(token)] for parent, token in zip(parents, ids, strict=True)]
        length = len(sequences[0])
        ended = np.array([token in self.stop for token in ids.tolist()]) | (length >= self.max_new_tokens)

        going_on = np.argsort(-np.where(ended, scores + np.float32(_NEVER), scores), kind="stable")[: self.beams]
        full = self.early_stopping and all(is_one for _, is_one, _ in self._finished)
        if self._improvable and not full:
            penalty = np.float32(length**self.length_penalty)
            new = [(scores[i] / penalty, True, sequences[i]) for i in range(min(self.beams, len(scores))) if ended[i]]
            self._finished = sorted([*self._finished, *new], key=lambda entry: -entry[0])[: self.beams]
        self._sequences = [sequences[i] for i in going_on]
        self._scores = np.where(ended, scores + np.float32(_NEVER), scores)[going_on].astype(np.float32)

        finished = [is_one for _, is_one, _ in self._finished]
        worst = min(score for score, _, _ in self._finished)
        best_running = self._scores[0] / np.float32(length**self.length_penalty)
        self._improvable &= any(best_running > (worst if is_one else np.float32(_NEVER)) for is_one in finished)
        self.done = not self._improvable or (self.early_stopping and all(finished)) or bool(ended.all())
        return parents[going_on].tolist()
