"""``python -m engine.report``: one self-contained HTML page of a run, or of several beside each other."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.cli import ArgumentParser
from engine.data.listing import write_all
from engine.device import pick_device
from engine.errors import UserError
from engine.output import free_file
from engine.report.mistakes import Mistake, find_mistakes
from engine.report.page import make_page
from engine.report.runs import read_runs


def main(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    device = pick_device(args.device)
    output = _output(args)
    runs = read_runs(args.runs)
    mistakes: list[tuple[list[Mistake], str]] = []
    for run in runs:
        if args.no_images:
            mistakes.append(([], "The images were left out of this page (--no-images)."))
        else:
            mistakes.append(find_mistakes(run, device) if run.metrics else ([], ""))
    page = make_page(runs, mistakes)
    write_all(output.parent, {output.name: page.encode()})
    print(f"written to {output}")


def _output(args: argparse.Namespace) -> Path:
    """Where the page goes: in a single run's own directory it may be made again, elsewhere nothing is overwritten."""
    if args.output is not None:
        return free_file(args.output, force=args.force)
    if len(args.runs) > 1:
        raise UserError(f"a report of {len(args.runs)} runs belongs to none of them: add --output FILE.html")
    return Path(args.runs[0]) / "report.html"


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m engine.report",
        description="Make one self-contained HTML page of a run, or of several beside each other.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", help="a run; of several each is compared with the first")
    parser.add_argument("--output", metavar="FILE", help="the page; RUN_DIR/report.html by default, of one run")
    parser.add_argument("--force", action="store_true", help="replace --output where it exists")
    parser.add_argument(
        "--no-images", action="store_true", help="leave the run's images out: no worst mistakes, no Grad-CAM"
    )
    parser.add_argument("--device", help="what Grad-CAM is computed on: cuda, cuda:1 or cpu; cuda where there is one")
    return parser
