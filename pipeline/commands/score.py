"""`hificl score KIND`: official result files in, one JSON object out."""

from __future__ import annotations

import argparse

from pipeline.commands.parser import Command, CommandLine, Parser

_CAPTIONS = '[{"image_id": .., "caption": ".."}]'


def register(line: CommandLine) -> None:
    """Add the verb and its kinds."""
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
