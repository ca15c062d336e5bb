"""What `argparse` lacks: help by groups, the nearest name for a misspelt one, completion, two forms of an answer."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pipeline.core.errors import nearest

Command = Callable[[argparse.Namespace], Any]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest name that there is."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        print(f"error: {message.rstrip('.')}. See `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuse what is not known where it stands: a verb knows its options, who parses above it does not."""
        known, extra = super().parse_known_args(args, namespace)
        if extra:
            word = next((word for word in extra if word.startswith("-")), extra[0]).partition("=")[0]
            options = [name for name in self._option_string_actions if name.startswith("--")]
            hint = f". {nearest(word, options)}" if word.startswith("-") else ""
            self.error(f"unknown {'option' if hint else 'argument'} '{word}'{hint}")
        return known, extra

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            word = str(action.metavar or action.dest).lower()
            subject = f"value of {action.option_strings[-1]}" if action.option_strings else word
            self.error(f"unknown {subject} '{value}'. {nearest(str(value), map(str, action.choices))}")


class CommandLine(Parser):
    """A program of many verbs, which its help lists by group, one line each."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._verbs = self.add_subparsers(metavar="COMMAND", parser_class=Parser)
        self._groups: dict[str, dict[str, str]] = {}

    def verb(self, group: str, name: str, func: Command, text: str, *, answers: bool = False) -> Parser:
        """Add a verb.

        Args:
            group: where the help lists it.
            name: the verb.
            func: what it does; what it returns is printed.
            text: a line about it.
            answers: whether that is a `terminal.Answer`, which can be shown as a table too.
        """
        sub = self.family(group, name, text)
        sub.set_defaults(func=func)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if answers:
            form = sub.add_mutually_exclusive_group()
            for form_name, medium in (("json", "a pipe"), ("table", "a terminal")):
                text = f"print {form_name if form_name == 'table' else 'JSON'}, as into {medium}"
                form.add_argument(f"--{form_name}", dest="form", action="store_const", const=form_name, help=text)
        return sub

    def family(self, group: str, name: str, text: str) -> Parser:
        """Add a verb that has verbs of its own."""
        self._groups.setdefault(group, {})[name] = text
        sub: Parser = self._verbs.add_parser(name, help=text, description=text)
        return sub

    def complete(self) -> None:
        """Answer a shell that asks how a word goes on, and end; see `hificl completion`."""
        if "_ARGCOMPLETE" in os.environ:
            import argcomplete

            argcomplete.autocomplete(self)

    def format_help(self) -> str:
        """Return the verbs by group, and the options."""
        width = 2 + max(len(name) for verbs in self._groups.values() for name in verbs)
        options = {
            ", ".join(action.option_strings): str(action.help) for action in self._actions if action.option_strings
        }
        lines = [self.format_usage().strip(), "", str(self.description)]
        for title, rows in {**self._groups, "options": options}.items():
            lines += ["", f"{title}:", *(f"  {name:{width}}{text}" for name, text in rows.items())]
        return "\n".join([*lines, "", f"`{self.prog} COMMAND --help` says more."]) + "\n"


def settable(parser: Parser) -> None:
    """Add `--set`."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of params.yaml"
    )


def study_names(action: argparse.Action) -> None:
    """Let a shell complete the names of studies."""
    _complete_files(action, "studies")


def profile_name(action: argparse.Action) -> None:
    """Let a shell complete the names of profiles."""
    _complete_files(action, "profiles")


def _complete_files(action: argparse.Action, folder: str) -> None:
    names = lambda **_: sorted(file.stem for file in Path(folder).glob("*.yaml"))  # noqa: E731 - argcomplete calls it
    setattr(action, "completer", names)  # noqa: B010 - argcomplete's own attribute, which argparse does not declare


def flagged(flag: str, values: list[str]) -> list[str]:
    """Return the words that give a flag each of its values."""
    return [word for value in values for word in (flag, value)]
