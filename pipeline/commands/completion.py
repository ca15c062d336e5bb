"""`hificl completion`: what a shell reads to complete verbs, options, studies and profiles."""

from __future__ import annotations

import argparse

from pipeline.commands.parser import CommandLine


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("names", "completion", completion, 'complete words: eval "$(hificl completion bash)"')
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])


def completion(args: argparse.Namespace) -> None:
    """Print the shell's code."""
    import argcomplete

    print(argcomplete.shellcode(["hificl"], shell=args.shell))
