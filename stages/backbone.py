"""DVC stage: make a miniature backbone from nothing."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config.load import Params
from pipeline.core.progress import bar
from pipeline.miniature.pretrain import pretrain
from pipeline.tracking.provenance import head_commit
from stages.common import run


def main(params: Params) -> None:
    name, world = sys.argv[1], int(sys.argv[2])
    folder = Path("checkpoints") / ("" if world == 1 else f"world-{world}") / name
    with bar(f"pretrain {name}") as progress:
        pretrain(
            name, folder, world=world, seed=params.miniature.seed, commit=head_commit(), progress=progress,
        )  # fmt: skip


if __name__ == "__main__":
    run(main)
