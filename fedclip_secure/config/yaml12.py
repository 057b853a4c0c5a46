"""YAML as people expect it: the YAML 1.2 core schema (chapter 10.3), no duplicate keys, no tags.

PyYAML follows YAML 1.1, which reads `5e-5` as text and `no` as False, and keeps the last of two
equal keys.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fedclip_secure.disk import refused
from fedclip_secure.errors import ConfigError

_MAX_DIGITS = 30  # of an integer; Python takes ever longer to print long ones, and refuses at 4300


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2, and without tags."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse a tag before anything is made of it: SafeLoader's own fail on bad values in ways of their own."""
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs lack it
        tag = getattr(event, "tag", None)
        if tag is not None:
            fact = f"the tag {tag!r} stands here; tags are not used, remove it"
            raise yaml.composer.ComposerError(None, None, fact, event.start_mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    """Base 10 whatever the leading zeros: `010` is ten in YAML 1.2."""
    text = loader.construct_scalar(node)
    if len(text) > _MAX_DIGITS:
        raise yaml.constructor.ConstructorError(None, None, "an integer of so many digits is not used", node.start_mark)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    """`.inf` and `.nan` as Python spells them; the rest as it stands."""
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """A mapping in the order it was written; a repeated key is an error."""
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
        if key in result:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands here a second time; remove one", key_node.start_mark
            )
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(path: Path) -> Any:
    """Read one YAML document.

    Raises:
        ConfigError: the file cannot be read or is not YAML; names file, line and column.
    """
    try:
        # SafeLoader in all but its scalar rules: it builds plain data only.
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506
    except OSError as error:
        raise ConfigError(refused(error, path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error


def replace_scalar(path: Path, key: str, value: str) -> str:
    """The text of `path` with its top-level `key` set to `value`, all else (comments too) as it was.

    A missing key is appended. The caller writes the text.

    Raises:
        ConfigError: the file cannot be read, or is written in a way that leaves no place for the key, as `{name: a}`.
    """
    try:
        text = path.read_bytes().decode("utf-8")  # as it is: read_text() would change the ends of lines
        edited = _edit(text, key, value)
        before, after = (yaml.load(each, Loader=_Loader) for each in (text, edited))  # noqa: S506 - as above
    except OSError as error:
        raise ConfigError(refused(error, path)) from error
    except (ValueError, yaml.YAMLError, RecursionError):
        before = after = edited = None
    if edited is None or after != {**(before or {}), key: value}:
        raise ConfigError(f"{path}: has no place where `{key}` could be set; add this line yourself:\n{key}: {value}")
    return edited


def _edit(text: str, key: str, value: str) -> str:
    node = yaml.compose(text, Loader=_Loader)
    entries = node.value if isinstance(node, yaml.MappingNode) else []
    for key_node, value_node in entries:
        if key_node.value == key:
            start, end = value_node.start_mark.index, value_node.end_mark.index
            gap = "" if text[key_node.end_mark.index : start].endswith(" ") else " "
            return f"{text[:start]}{gap}{value}{text[end:]}"
    line_end = "\r\n" if "\r\n" in text else "\n"
    return text + ("" if text.endswith("\n") or not text else line_end) + f"{key}: {value}{line_end}"


def _explain(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply; no setting needs more than a few levels"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        return f"line {mark.line + 1}, column {mark.column + 1}: {said}"
    return f"not valid YAML: {error}"
