"""From a command line or a .yaml/.json file to the argument dataclasses.

A configuration file is turned into the words of a command line and goes through the same parser, so there is one
set of rules; words after the file override it (``run.py recipe.yaml --learning_rate 2e-5``).
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser

from FlagEmbedding.finetune.arguments import Arguments
from FlagEmbedding.finetune.dev.arguments import settle
from FlagEmbedding.utils.cli import check_words
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.io import parse_json


class _Parser(HfArgumentParser):
    """Reads our field makers beside Hugging Face's, and refuses in one line instead of a screen of usage."""

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        group = self.add_argument_group((dtype.__doc__ or "").partition("\n")[0].rstrip(".").split(";")[0])
        hints = get_type_hints(dtype)
        for original in fields(dtype):
            if not original.init:
                continue
            field = copy.copy(original)
            field.type = hints[field.name]
            if (ours := field.metadata.get("custom_args")) is not None:  # made by utils.cli
                aliases = field.metadata.get("alias", [])
                field.metadata = {"help": ours["help"], "aliases": aliases}  # type: ignore[assignment]
            self._parse_dataclass_field(group, field)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists all options)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling a flag (the hyphenated twins are accepted, not listed) and no negative twins."""

    def add_argument(self, action: argparse.Action) -> None:
        if not any(option.startswith("--no_") for option in action.option_strings):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = [option for option in action.option_strings if "-" not in option[2:]]
        metavar = "" if action.nargs == 0 else " " + self._format_args(action, action.dest.upper())
        return ", ".join(spellings or action.option_strings) + metavar


def build_parser() -> HfArgumentParser:
    """The parser of ``run.py``."""
    return _Parser(
        get_type_hints(Arguments).values(),
        # The generated usage line would be two screens long; the groups below it say the same.
        usage="run.py [recipe.yaml] --model_name_or_path MODEL --train_data FOLDER --output_dir DIR [options]",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        description="Fine-tune an XLM-R, RoBERTa or BERT retriever with the contrastive learning penalty and experts.",
    )


def parse_arguments(words: list[str]) -> Arguments:
    """Parse ``words`` (``sys.argv[1:]``). Raises ``UsageError`` for anything that is not an option of ours."""
    if words and not words[0].startswith("-"):
        words = [*config_words(Path(words[0])), *words[1:]]
    check_words(words)
    parser = build_parser()
    try:
        parts = parser.parse_args_into_dataclasses(args=words, look_for_args_file=False, return_remaining_strings=True)
    except (ValueError, OverflowError, argparse.ArgumentTypeError) as error:  # TrainingArguments' own checks
        raise UsageError(" ".join(str(error).split())) from error
    if parts[-1]:
        raise UsageError(f"unknown option {parts[-1][0]} (--help lists all options)")
    arguments = Arguments(*parts[:-1])
    settle(arguments.training, arguments.evaluation)
    return arguments


def config_words(path: Path) -> list[str]:
    """A .yaml or .json mapping as command-line words. Lists become several words, null leaves the default."""
    if path.suffix not in {".yaml", ".yml", ".json"}:
        raise UsageError(f"{path}: expected a .yaml or .json configuration or an option, got {path.name!r}")
    if not path.is_file():
        raise UsageError(f"{path}: no such configuration file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        values: Any = parse_json(text, _once) if path.suffix == ".json" else _yaml_values(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not valid {path.suffix[1:]}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        came = "nothing" if values is None else "a list" if isinstance(values, list) else f"the value {values!r}"
        raise UsageError(f"{path}: expected a mapping of option names to values (learning_rate: 1e-5), found {came}")
    words: list[str] = []
    for key, value in values.items():
        items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        if odd := [item for item in items if isinstance(item, list | dict) or (item is None and items is value)]:
            raise UsageError(f"{path}: {key}: expected texts and numbers in the list, found {json.dumps(odd[0])}")
        texts = list(map(str, items))
        if len(texts) == 1 and texts[0].startswith("-"):
            words.append(f"--{key}={texts[0]}")  # a text that would pass for an option
        else:
            words += [] if value is None else [f"--{key}", *texts]
    return words


def _yaml_values(text: str) -> Any:
    """The value of a YAML text; in its mapping numbers are what is written (YAML makes 8 of 010, 45045 of 12:30:45).

    Raises:
        ValueError: an option is there twice.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            return None if root is None else loader.construct_document(root)
        loader.flatten_mapping(root)

        def written(node: yaml.Node) -> Any:
            if isinstance(node, yaml.SequenceNode):
                return [written(item) for item in node.value]
            number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
            return node.value if number else loader.construct_object(node, deep=True)

        return _once([(str(loader.construct_object(key, deep=True)), written(node)) for key, node in root.value])
    finally:
        loader.dispose()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found
