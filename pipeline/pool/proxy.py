"""What Ray Tune sees of a trial: a light actor that waits for the slot's reports. Imports neither torch nor MLflow."""

from __future__ import annotations

from typing import Any

import ray
from ray import tune

from pipeline.pool.messages import PROXY_DIED
from pipeline.records.trial import TrialReport


class TrialProxy(tune.Trainable):
    """One trial for Tune's schedulers and searchers; the work is done in a slot of the dispatcher."""

    def setup(self, config: dict[str, Any], dispatcher: Any = None) -> None:
        """Take a trial; it is handed over with the first step.

        Tune throws away a process that was too slow to start, and lets another one have its trial: one that handed
        over what had been stopped by then would have it trained again, with nobody to wait for it.
        """
        self._dispatcher = dispatcher
        self._key: str | None = None
        self.reset_config(config)

    def step(self) -> dict[str, Any]:
        """Return the next epoch's report; the dispatcher knows what the configuration stands for."""
        try:
            if self._key is None:
                self._key = ray.get(self._dispatcher.submit.remote(self._trial_config))
            report: TrialReport = ray.get(self._dispatcher.next.remote(self._key, self._seen))
        except ray.exceptions.ActorDiedError:  # Tune would print it, and start actors anew that find none either
            return {"epoch": self._seen, "done": True, "error": PROXY_DIED}
        if report.error is None:
            self._seen += 1
        # an exception would make Tune try again what the dispatcher has given up
        fields = {"epoch": report.epoch, **(report.metrics.metrics if report.metrics else {})}
        return {**fields, "done": report.end is not None, "error": report.error}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Serve another trial in this process."""
        self._trial_config, self._seen = new_config, 0
        self._key = None
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing to keep: the trial store holds the state."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """See `save_checkpoint`."""
