"""`hificl world` and `hificl pretrain`: the miniature's pictures with their annotations, and its backbones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipeline.commands.parser import CommandLine


def register(line: CommandLine) -> None:
    """Add the verbs."""
    text = "write its pictures and annotations, in the official formats"
    parser = line.verb("miniature", "world", _world, text)
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-train-images", type=int, default=2500)
    parser.add_argument("--num-val-images", type=int, default=2500)
    parser.add_argument("--difficulty", type=float, default=0.2)
    parser.add_argument("--picture", metavar="FILE", help="also draw the first pictures with their texts, as PNG")

    parser = line.verb("miniature", "pretrain", _pretrain, "make one of its backbones from nothing")
    parser.add_argument("backbone")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", default="small", help="small, or large: 17 million parameters, for a GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="another number than the usual two rounds sums otherwise")


def _world(args: argparse.Namespace) -> Any:
    """Write the world and return what was written."""
    from pipeline.miniature.world import write_world

    written = write_world(
        Path(args.folder), seed=args.seed, num_train_images=args.num_train_images,
        num_val_images=args.num_val_images, difficulty=args.difficulty,
    )  # fmt: skip
    if args.picture:
        from pipeline.report.miniature import draw_world

        draw_world(Path(args.folder), Path(args.picture))
    return written


def _pretrain(args: argparse.Namespace) -> None:
    """Pretrain a backbone and draw how it learned."""
    from pipeline.core.progress import bar
    from pipeline.miniature import pretrain as training
    from pipeline.report.miniature import draw_emergence
    from pipeline.tracking.provenance import head_commit

    with bar(f"pretrain {args.backbone}") as progress:
        training.pretrain(
            args.backbone, Path(args.out), seed=args.seed, size=args.size, device=args.device,
            commit=head_commit(), progress=progress, num_threads=args.threads or training.NUM_THREADS,
        )  # fmt: skip
    draw_emergence(Path(args.out), Path(args.out) / "pretraining.svg")
