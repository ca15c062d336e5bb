"""Processes for a trial's ranks, forked from one that has the libraries: each would import them for seconds."""

from __future__ import annotations

from multiprocessing.context import ForkServerContext

import torch.multiprocessing as mp

# Installed packages alone: what is this repository's each rank imports itself, by the path that it is given.
LIBRARIES = ["torch", "torchvision", "transformers", "transformers.image_processing_backends"]


def fresh_processes() -> ForkServerContext:
    """Return where processes come from that share no state with this one, nor with those before them."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context
