"""`hificl params`: how many parameters a method trains on a real configuration; no weights, no memory."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.commands.parser import CommandLine, settable
from pipeline.core.errors import InputError
from pipeline.core.terminal import Answer, short, table

if TYPE_CHECKING:
    from rich.console import RenderableType


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("check", "params", params, "a method's trainable parameters on a real backbone", answers=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--method", required=True)
    settable(parser)


def params(args: argparse.Namespace) -> Count:
    """Count what the command line names."""
    return count(args.backbone, args.method, args.set)


@dataclass(frozen=True)
class Count(Answer):
    """The parameters that a method trains, in all and by module."""

    backbone: str
    method: str
    options: dict[str, Any]
    trainable: int
    modules: dict[str, int]

    def record(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    def shown(self) -> Iterator[RenderableType]:
        """Give the sum, and a row for the modules that have one name but for the layer's number."""
        yield f"{self.method} on {self.backbone}: {self.trainable:,} trainable parameters"
        yield f"options: {short(self.options)}\n"
        alike: dict[str, list[int]] = {}
        for name, size in self.modules.items():
            alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(size)
        rows = table("module", "how many", "parameters", right=("how many", "parameters"))
        for name, sizes in alike.items():
            rows.add_row(name, str(len(sizes)), f"{sum(sizes):,}")
        yield rows


def count(backbone: str, method: str, settings: list[str]) -> Count:
    """Return what a method trains on a backbone's real configuration.

    Args:
        backbone: a registered backbone.
        method: a method that trains.
        settings: its options as `key=value`.

    Raises:
        InputError: unknown backbone, method or option.
    """
    from pipeline import adapters, backbones
    from pipeline.core.plain_yaml import read

    options = {}
    for item in settings:
        key, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"'{item}' is not of the form key=value", where="--set", way_out="Write --set rank=8")
        options[key] = read(text, f"--set {key}")
    checked = adapters.options_of(method).checked(options, method)
    model = backbones.load(backbone, variant="meta").model
    adapter = adapters.make(method, model, checked)
    return Count(backbone, method, checked.plain(), adapter.num_trainable(), adapter.modules_trainable())
