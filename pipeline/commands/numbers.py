"""`hificl score KIND`: official result files in, one JSON object out; `hificl bench`: ratios in alternation."""

from __future__ import annotations

import argparse
from importlib import import_module, util
from types import ModuleType
from typing import TYPE_CHECKING

from pipeline.commands.parser import Command, CommandLine, Parser
from pipeline.core.errors import InputError

if TYPE_CHECKING:
    from pipeline.core.plain_yaml import Json


_CAPTIONS = '[{"image_id": .., "caption": ".."}]'


def register(line: CommandLine) -> None:
    """Add the verbs."""
    _register_score(line)
    parser = line.verb("numbers", "bench", _bench, "measure ratios in alternation in one run")
    parser.add_argument("verb", nargs="?")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cpu for all but cuda")
    parser.add_argument("--minutes", type=float, help="of bench cuda: all that it may take; 9 unless given")
    parser.add_argument("--out", metavar="FOLDER", help="of bench cuda: for cuda.jsonl; runs/bench unless given")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/<verb>-<device>.json")
    parser.add_argument("--list", action="store_true", help="print the verbs, one a line")
    parser.add_argument("--table", action="store_true", help="print benchmarks/*.json as Markdown")
    text = "with --table: also write it between the marks of a document"
    parser.add_argument("--into", metavar="FILE", help=text)


def _register_score(line: CommandLine) -> None:
    family = line.family("numbers", "score", "score a file of predictions with the official metrics")
    kinds = family.add_subparsers(title="what is scored", metavar="KIND", required=True, parser_class=Parser)

    def kind(name: str, func: Command, summary: str, results: str) -> Parser:
        parser: Parser = kinds.add_parser(name, help=summary, description=summary)
        parser.set_defaults(func=func)
        if results:
            parser.add_argument("--results", required=True, metavar="R", help=f"result file: {results}")
        return parser

    parser = kind("vqa", _vqa, "VQA accuracy, percent", '[{"question_id": .., "answer": ".."}]')
    parser.add_argument("--questions", required=True, metavar="Q", help="official questions file")
    parser.add_argument("--annotations", required=True, metavar="A", help="official annotations file")
    text = "always (default, MimIC's scorer and the papers' figures) or official (not where all annotators agree)"
    parser.add_argument("--normalise", choices=["always", "official"], default="always", help=text)
    parser.add_argument("--subset", action="store_true", help="accept results for a part of the questions")
    text = "compare the stems of the results: for OK-VQA, whose answers are stems"
    parser.add_argument("--stem", action="store_true", help=text)

    parser = kind("caption", _caption, "CIDEr-D, BLEU, METEOR, ROUGE-L, fractions", _CAPTIONS)
    parser.add_argument("--annotations", required=True, metavar="A", help="official captions file")
    text = "CIDEr Bleu_1..4 METEOR ROUGE_L SPICE (default: all, SPICE only if named)"
    parser.add_argument("--metrics", nargs="+", metavar="M", help=text)

    parser = kind("chair", _chair, "CHAIR_s, CHAIR_i and recall of objects, fractions", _CAPTIONS)
    parser.add_argument("--instances", nargs="+", default=[], metavar="I", help="official instances files")
    parser.add_argument("--captions", nargs="+", default=[], metavar="C", help="official captions files")
    parser.add_argument("--objects", metavar="O", help='ready ground truth, {"image_id": ["object", ..]}')

    parser = kind("mme", _mme, "MME: points of perception and cognition", "")
    parser.add_argument("--results", required=True, metavar="DIR", help="folder of <subtask>.txt")
    parser.add_argument("--subset", action="store_true", help="accept a folder that lacks subtasks")

    a_line = '{"question_id": "..", "prediction": "A", "gt_answer": "A"} a line'
    parser = kind("seed-bench", _seed_bench, "SEED-Bench accuracy, a fraction", a_line)
    parser.add_argument("--questions", metavar="Q", help="SEED-Bench.json: answers and dimensions")

    a_line = '{"id": .., "options": .., "answer": "A", "response": ".."} a line'
    parser = kind("mmmu-pro", _mmmu_pro, "MMMU-Pro accuracy, a fraction", a_line)
    parser.add_argument("--seed", type=int, default=0, help="of the letters drawn for unreadable replies (default 0)")


def _vqa(args: argparse.Namespace) -> dict[str, object]:
    from pipeline.scores.official import score_vqa

    return score_vqa(
        args.results, args.questions, args.annotations, normalise=args.normalise, subset=args.subset, stem=args.stem
    )


def _caption(args: argparse.Namespace) -> dict[str, object]:
    from pipeline.scores.official import score_caption

    return score_caption(args.results, args.annotations, args.metrics)


def _chair(args: argparse.Namespace) -> dict[str, object]:
    from pipeline.scores.official import score_chair

    return score_chair(args.results, instances=args.instances, captions=args.captions, objects=args.objects)


def _mme(args: argparse.Namespace) -> dict[str, object]:
    from pipeline.scores.official import score_mme

    return score_mme(args.results, subset=args.subset)


def _seed_bench(args: argparse.Namespace) -> dict[str, object]:
    from pipeline.scores.official import score_seed_bench

    return score_seed_bench(args.results, args.questions)


def _mmmu_pro(args: argparse.Namespace) -> dict[str, object]:
    from pipeline.scores.official import score_mmmu_pro

    return score_mmmu_pro(args.results, seed=args.seed)


def _bench(args: argparse.Namespace) -> Json | None:
    """Measure, or print what can be or was measured."""
    benchmarks = _installed()
    if args.list or args.table:
        print("\n".join(benchmarks.verbs()) if args.list else benchmarks.table(into=args.into))
        return None
    if args.verb is None:
        raise InputError("which benchmark?", way_out=f"One of {', '.join(benchmarks.verbs())}, or --list")
    return benchmarks.run(args.verb, device=args.device, save=args.save, minutes=args.minutes, out=args.out)


def _installed() -> ModuleType:
    """Return the package of the benchmarks: it lies beside this one, imports it, and is not imported by it.

    Raises:
        InputError: this is a copy without it.
    """
    spec = util.find_spec("benchmarks")
    if spec is None or spec.origin is None:  # not there, or a folder of results alone
        way_out = "Run it in a checkout of hificl-lab after make setup, which installs its folder benchmarks/ too"
        raise InputError("the benchmarks are not installed", way_out=way_out)
    return import_module("benchmarks")
