"""YAML as people expect it: the YAML 1.2 core schema (chapter 10.3), no duplicate keys, no tags.

PyYAML follows YAML 1.1, which reads `5e-5` as text and `no` as False, and keeps the last of two
equal keys.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fedclip_secure.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2."""


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
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error


def replace_scalar(path: Path, key: str, value: str) -> str:
    """The text of `path` with its top-level `key` set to `value`, all else (comments too) as it was.

    A missing key is appended. The caller writes the text.
    """
    text = path.read_text(encoding="utf-8")
    node = yaml.compose(text, Loader=_Loader)
    entries = node.value if isinstance(node, yaml.MappingNode) else []
    for key_node, value_node in entries:
        if key_node.value == key:
            start, end = value_node.start_mark.index, value_node.end_mark.index
            gap = "" if text[key_node.end_mark.index : start].endswith(" ") else " "
            return f"{text[:start]}{gap}{value}{text[end:]}"
    return text + ("" if text.endswith("\n") or not text else "\n") + f"{key}: {value}\n"


def _explain(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return f"not valid YAML: {error}"
