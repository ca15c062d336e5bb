"""The trials that cells chose, registered as models."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.errors import HificlError
from pipeline.progress import say
from pipeline.sweep.store import TrialStore
from pipeline.tracking.models import Chosen
from pipeline.tracking.runs import Tracker
from pipeline.trial import digest

# scores on the selection split can be compared where these agree
_PROTOCOL = ("backbone_digest", "manifest_digest", "selection", "selection_metric", "num_selection_samples")


def register_chosen(tracker: Tracker, store: TrialStore, trials: Iterable[str | None]) -> None:
    """Register the adapters of the chosen trials; a store that cannot is said and stops nothing.

    The numbers are written already, and the next evaluation registers what is missing.
    """
    found = []
    for key in dict.fromkeys(trials):
        if key is None or not (store.folder(key) / "adapter").is_dir():
            continue
        config, end = store.record(key).config, store.done(key)
        protocol = digest([config[name] for name in _PROTOCOL])[:16]
        backbone, task, method = (str(config[name]) for name in ("backbone", "task", "method"))
        found.append(Chosen(key, backbone, task, method, end.objective if end else None, protocol))
    try:
        number = tracker.register(found)
    except HificlError as error:
        say(f"warning: adapters are not registered as models: {error}")
        return
    if number:
        say(f"registered as models: {number} adapters")
