"""`hificl workspace`: a folder that runs another profile beside this one."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.commands.parser import CommandLine, profile_name


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("run", "workspace", workspace, "make a folder that runs another profile beside this one")
    parser.add_argument("folder")
    profile_name(parser.add_argument("--profile", required=True))
    parser.add_argument("--data", help="folder of the official files")


def workspace(args: argparse.Namespace) -> None:
    """Make the folder, or bring it up to date."""
    from pipeline.commands.workspace_folder import create

    create(Path(args.folder), profile=args.profile, data=Path(args.data) if args.data else None)
