"""From a YAML file and the command line to a `Config`, and back. In: paths and words. Out: one `Config`, or one clear line.

jsonargparse does the types; the keys are checked here first, so that a misspelt one is answered with the nearest name.
"""

import difflib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from gsae.config import Config, SweepConfig
from gsae.errors import ConfigError

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def config_parser(stage: str) -> ArgumentParser:
    """The parser of `gsae STAGE CONFIG [--section.field value ...]`; its help shows every field with unit and default."""
    sweep = ArgumentParser(add_help=False, usage="")
    sweep.add_class_arguments(SweepConfig)
    listing = sweep.format_help().partition(":\n")[2]
    parser = ArgumentParser(
        prog=f"gsae {stage}",
        usage=f"gsae {stage} CONFIG [--section.field value ...]",
        description="CONFIG is a YAML file; every field below may stand in it, or on the command line, which wins.",
        epilog=f"Each item of train.sweeps has the fields:\n{listing}",
        exit_on_error=False,
    )
    parser.formatter_class = _keep_epilog(parser.formatter_class)
    parser.add_argument("--config", action="config", help="The same as CONFIG.")
    parser.add_class_arguments(Config)
    return parser


def _keep_epilog(base: type) -> type:
    """A help formatter that does not reflow the epilog."""

    class Formatter(base):  # type: ignore[misc]
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text

    return Formatter


def read_config(stage: str, words: Sequence[str]) -> Config:
    """The config that a command line asks for.

    Args:
        stage: name of the stage, for messages.
        words: CONFIG and overrides, e.g. `["configs/demo.yaml", "--train.groups", "2"]`.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value has the wrong type or breaks a rule.
    """
    if not words or words[0].startswith("-"):
        raise ConfigError(f"no config given; usage: gsae {stage} CONFIG [--section.field value ...]")
    path, overrides = Path(words[0]), list(words[1:])
    known = list(_field_names(Config))
    of_lists = [name for name in known if name.startswith("train.sweeps.")]
    for key in _keys_of_file(path):
        _require_known(key, known, str(path))
    for word in overrides:
        if word.startswith("--"):
            key = word[2:].partition("=")[0].removesuffix("+")
            if key in of_lists:
                raise ConfigError(
                    f"{key} belongs to each item of a list; set it in {path}, or give the whole list as --train.sweeps '[...]'"
                )
            _require_known(key, known, "the command line")
    parser = config_parser(stage)
    try:
        parsed = parser.instantiate(parser.parse_args(["--config", str(path), *overrides]))
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error), str(path))) from error
    return Config(**{field.name: getattr(parsed, field.name) for field in fields(Config)})


def dump_config(config: Config) -> str:
    """The resolved config as YAML; `read_config` reads it back."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, width=120)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _field_names(tree: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of a dataclass tree; items of a list of dataclasses are named `list.field`."""
    hints = typing.get_type_hints(tree)
    for field in fields(tree):
        name = prefix + field.name
        yield name
        for inner in (hints[field.name], *typing.get_args(hints[field.name])):
            if is_dataclass(inner) and isinstance(inner, type):
                yield from _field_names(inner, f"{name}.")


def _keys_of_file(path: Path) -> Iterator[str]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path} holds no settings; see configs/demo.yaml for an example")
    yield from _keys(tree, set(_field_names(Config)))


def _keys(tree: dict[Any, Any], known: set[str], prefix: str = "") -> Iterator[str]:
    """Dotted keys of the file down to the leaves of the config; what stands inside a free mapping (lambdas) is not a key."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        yield name
        if not any(other.startswith(f"{name}.") for other in known):
            continue
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict):
                raise ConfigError(f"{name} is {item!r}, but it is a section; give its settings below it, one a line")
            yield from _keys(item, known, f"{name}.")


def _require_known(key: str, known: list[str], where: str) -> None:
    if key in known or key in ("config", "help"):
        return
    last = key.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    hint = f"did you mean {near[0]}?" if near else "see --help for all settings"
    raise ConfigError(f"unknown setting {key} in {where}; {hint}")


def _one_line(message: str, path: str) -> str:
    words = " ".join(message.split()).replace("Parser key ", "").replace("<class '", "").replace("'>", "")
    return f"config {path}: {words}"
