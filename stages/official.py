"""DVC stage: the folder of the official files, which are the user's own; in a copy that DVC made, links to them."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.load import Params, data_root
from pipeline.core import copies
from pipeline.core.progress import say
from stages.common import run

FOLDER = Path("data/real")


def main(params: Params) -> None:
    if data_root(params) == FOLDER:  # another profile reads none of them, and DVC would read all
        copies.link_official(Path.cwd())
    FOLDER.mkdir(parents=True, exist_ok=True)
    if (links := copies.unwatched(FOLDER)) is not None:
        say(f"note: {links}. {copies.UNWATCHED_WAY_OUT}")


if __name__ == "__main__":
    run(main)
