"""How long a sweep still takes, told from what its epochs took so far."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping

from pipeline.config.trial import TrialConfig

EpochKind = tuple[str, str, int]  # backbone, method, shots of its teacher: what an epoch's seconds a sample depend on


class TimeLeft:
    """The time left, `elapsed * W / D`.

    D are the seconds of the epochs seen; W those that the epochs to come would take, each at its kind's seconds a
    sample (a kind not seen yet: at the mean of all), and those of the points that a searcher will still ask for, each
    as the ones that have ended. What lies between `elapsed` and D, slots side by side, packs, a teacher's pass before
    the first epoch, is taken to go on as it was.

    Args:
        trials: those to be trained, by key.
        points: how many more a searcher will ask for.
    """

    def __init__(self, trials: Mapping[str, TrialConfig], points: int = 0) -> None:
        self._trials, self._points = trials, points
        self._open = {key: config.epochs for key, config in trials.items()}
        self._left: Counter[EpochKind] = Counter()  # samples to come, once an epoch
        for config in trials.values():
            self._left[_kind(config)] += config.epochs * config.num_train_samples
        self._samples: dict[EpochKind, int] = defaultdict(int)
        self._seconds: dict[EpochKind, float] = defaultdict(float)
        self._asked: dict[str, float] = defaultdict(float)  # seconds of the points asked for, and of those that ended
        self._ended: list[float] = []
        self._started: float | None = None

    def on_epoch(self, key: str, epoch: int, seconds: float) -> None:
        """Take in what the epoch `epoch` (from 1) of a trial took.

        The clock runs from where the first of them began: a cluster's start and a backbone's loading come once.
        """
        if self._started is None:
            self._started = time.monotonic() - seconds
        config = self._trials.get(key)
        if config is None:
            self._asked[key] += seconds
            return
        self._samples[_kind(config)] += config.num_train_samples
        self._seconds[_kind(config)] += seconds
        self._close(key, max(0, config.epochs - epoch))

    def on_end(self, key: str) -> None:
        """Count no further epochs of a trial."""
        if key in self._trials:
            self._close(key, 0)
        else:
            self._ended.append(self._asked[key])

    def left(self) -> float | None:
        """Return the seconds to go; None while too little was seen to tell."""
        trained = sum(self._seconds.values())
        spent = trained + sum(self._asked.values())
        to_ask = max(0, self._points - len(self._ended))
        samples = sum(self._samples.values())
        if self._started is None or not spent or (to_ask and not self._ended) or (self._trials and not samples):
            return None
        to_come = sum(
            count * (self._seconds[kind] / self._samples[kind] if self._samples[kind] else trained / samples)
            for kind, count in self._left.items()
        )
        if to_ask:
            to_come += to_ask * sum(self._ended) / len(self._ended)
        return (time.monotonic() - self._started) / spent * to_come

    def _close(self, key: str, epochs: int) -> None:
        config = self._trials[key]
        closed, self._open[key] = self._open[key] - epochs, epochs
        self._left[_kind(config)] -= closed * config.num_train_samples


def _kind(config: TrialConfig) -> EpochKind:
    return config.backbone, config.method, config.num_shots
