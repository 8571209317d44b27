"""The command line of a training run, and of the commands that take its flags: flags over a recipe over defaults."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from engine.cli import ArgumentParser
from engine.config import Config, spelled
from engine.config_values import checked_values
from engine.errors import UserError

RECIPES = Path(__file__).with_name("recipes")


def parse_args(argv: list[str] | None) -> tuple[Config, str | None]:
    """The configuration that a command line asks for, and the run directory or checkpoint of ``--resume``.

    Raises UserError for what the user can mend.
    """
    parser = make_parser(
        "python -m engine.train",
        "Train an image classifier on imbalanced data; without --data-dir or --csv on the embedded digits.",
    )
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a run from its last checkpoint")
    parser.add_argument(
        "--list-recipes", action=_ListRecipes, nargs=0, help="list the built-in recipes with what each reproduces"
    )
    add_run_flags(parser)
    args = parser.parse_args(argv)
    given = vars(args).copy()
    resume, recipe = given.pop("resume", None), given.pop("recipe", None)
    if resume is not None:
        return _resumed(resume, given, recipe), resume
    return resolve(args), None


def resolve(args: argparse.Namespace, default_recipe: str | None = "digits") -> Config:
    """The configuration that the flags of ``add_run_flags`` ask for; what else was parsed is left alone.

    ``default_recipe`` serves where neither data nor a recipe is named. Raises UserError for what the user can mend.
    """
    fields = {field.name for field in dataclasses.fields(Config)}
    given = {name: value for name, value in vars(args).items() if name in fields}
    recipe = getattr(args, "recipe", None)
    if recipe is None and not given.get("data_dir") and not given.get("csv"):
        recipe = default_recipe
    values = read_recipe(recipe) if recipe else {}
    config = Config.from_mapping(values | given, "the command line")
    require_fused(config, given.get("fused_scope"))
    return config


def require_fused(config: Config, scope: str | None) -> None:
    """Raises UserError where a command line names a ``--fused-scope`` and nothing is to be fused."""
    if scope is not None and not config.fused_se:
        raise UserError(f"--fused-scope {scope} does nothing without --fused-se; add --fused-se or leave it out")


# What may differ when a run goes on: where it runs, not what it computes.
MAY_CHANGE_ON_RESUME = ("workers", "device", "fused_se", "fused_scope")


def _resumed(resume: str, given: dict[str, Any], recipe: str | None) -> Config:
    path = Path(resume)
    args_file = (path if path.is_dir() else path.parent) / "args.yaml"
    if not args_file.exists():
        raise UserError(f"--resume {resume}: no args.yaml there; name a run directory that engine.train made")
    if recipe is not None:
        raise UserError("--recipe does not go with --resume: a run goes on with its own args.yaml")
    values = checked_values(dataclasses.fields(Config), _read_yaml(args_file), str(args_file))
    before, after = Config(**values), Config.from_mapping(values | given, "the command line")
    for name in given:
        old, new = getattr(before, name), getattr(after, name)
        if name not in MAY_CHANGE_ON_RESUME and old != new:
            raise UserError(
                f"{spelled(name)} {new} does not go with --resume (the run has {old}); "
                f"start a new run with --recipe {args_file} {spelled(name)} {new}"
            )
    require_fused(after, given.get("fused_scope"))
    return after


def read_recipe(name: str) -> dict[str, Any]:
    """The options of a built-in recipe or of a YAML file, over those of the recipe that its key ``base`` names.

    Raises UserError for an unknown recipe, or one that is based on itself.
    """
    values: dict[str, Any] = {}
    for path, own in _lineage(name):
        values = checked_values(dataclasses.fields(Config), own, str(path)) | values
    return values


def about_recipe(name: str) -> str:
    """What a recipe reproduces, by its key ``about``, in one line; empty where it does not say."""
    return " ".join(_recipe_file(_recipe_path(name, Path())).get("about", "").split())


def list_recipes(width: int = 80) -> str:
    """The built-in recipes and what each reproduces, in two columns that are together ``width`` wide."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    indent = max(map(len, names)) + 2
    entries = (
        textwrap.fill(
            about_recipe(name),
            max(width, 2 * indent),
            initial_indent=f"{name:{indent}}",
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
        for name in names
    )
    return "\n".join(entries)


class _ListRecipes(argparse.Action):
    """Prints them and ends the command, as ``--help`` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(list_recipes(shutil.get_terminal_size((100, 24)).columns))
        parser.exit()


def _lineage(name: str) -> list[tuple[Path, dict[str, Any]]]:
    """The recipe and what it is based on, itself first: the files, and what each says of a run."""
    path = _recipe_path(name, Path())
    found: list[tuple[Path, dict[str, Any]]] = []
    while True:
        own = dict(_recipe_file(path))
        base = own.pop("base", None)
        own.pop("about", None)
        found.append((path, own))
        if base is None:
            return found
        path = _recipe_path(base, path.parent)
        if path in (known for known, _ in found):
            raise UserError(f"{found[-1][0]}: base: {base} is based on this recipe itself; name another one")


def _recipe_file(path: Path) -> dict[str, Any]:
    """The mapping of a file, its keys ``about`` and ``base`` checked."""
    values = _read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of options, such as `epochs: 20`")
    for key in ("about", "base"):
        if not isinstance(values.get(key, ""), str):
            raise UserError(f"{path}: {key}: {values[key]!r} must be a text")
    return values


def _recipe_path(name: str, folder: Path) -> Path:
    """The file of a built-in recipe, or a YAML file, whose relative name starts from ``folder``."""
    path = folder / name if Path(name).suffix in (".yaml", ".yml") else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise UserError(f"--recipe {name}: no such recipe; name a YAML file or one of: {known}")
    return path


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error


def make_parser(prog: str, description: str) -> ArgumentParser:
    """For a command that takes the flags of a training run (``add_run_flags``), with ``--recipe``.

    A flag that is absent leaves no attribute, unless it is given a default.
    """
    parser = ArgumentParser(
        prog=prog,
        description=description,
        # absent flags must not hide what a recipe says
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", metavar="NAME|FILE", help="options from a built-in recipe or a YAML file")
    return parser


def add_run_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup, *, without: Sequence[str] = ()) -> None:
    """A flag for each field of `Config`, but for those that the command has a meaning of its own for."""
    for field in dataclasses.fields(Config):
        if field.name in without or "recipe_only" in field.metadata:
            continue
        default: Any = field.default
        argument = dict(field.metadata["argument"])
        names = [spelled(field.name)] + ([field.metadata["short"]] if field.metadata["short"] else [])
        shown = "" if default is None else f" (default: {default})"
        if argument.pop("switch", False):
            argument["action"] = argparse.BooleanOptionalAction
        elif argument.pop("names", False):
            argument = {"metavar": "NAME", "nargs": "+"} | argument
            shown = ""
        elif argument.pop("words", None):
            argument |= {"metavar": "NAME|NUMBER", "nargs": "+"}
        elif "nargs" in argument:
            number = argument.setdefault("type", float)
            argument["metavar"] = number.__name__.upper()
            shown = f" (default: {' '.join(f'{value:g}' for value in default)})" if default else ""
        elif "choices" not in argument:
            argument["metavar"] = argument["type"].__name__.upper()
        parser.add_argument(*names, dest=field.name, help=field.metadata["help"].replace("%", "%%") + shown, **argument)
