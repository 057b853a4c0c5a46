"""Field types that both YAML files share, and the one way to turn a file into a checked model."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from fedclip_secure.config.yaml12 import read_yaml
from fedclip_secure.errors import ConfigError
from fedclip_secure.names import AGGREGATOR, NAME_PATTERN

M = TypeVar("M", bound=BaseModel)
_PIN = r"^sha256:[0-9a-f]{64}$"
# A terminal would obey control characters, and a plan from a stranger could so forge the fingerprints below it.
CONTROL = r"\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069"
_PRINTABLE = rf"^[^{CONTROL}]*$"
_UNIONS = ("model", "data", "encoder", "split")  # keys that hold one of several models
_IN_WORDS = {  # pydantic's kinds of faults, where its own words would not help a person
    "string_type": "must be text, in quotes where it looks like a number",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "union_tag_not_found": "lacks {discriminator}; add it",
    "union_tag_invalid": "{discriminator} must be one of {expected_tags}",
}
_PATTERNS = {
    NAME_PATTERN: "must have a-z, 0-9 and - only, at most 63",
    _PIN: "must be sha256: and 64 digits, as `fedclip-silo accept` writes it; remove it and accept again",
    _PRINTABLE: "holds a control character; remove it",
}
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
# Beyond them accountants' squares over- and underflow, and no noise may cost nothing.
LEAST_NOISE, MOST_NOISE = 1e-3, 1e6
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Strict(BaseModel):
    """A frozen model that converts nothing and knows every key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _is_absent(value: object) -> bool:
    return value is None


def _seconds(value: object) -> object:
    """`90s`, `10m`, `2h`, `1d` in seconds; a plain integer is seconds already."""
    if isinstance(value, str):
        match = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", value)
        if match is None:
            raise ValueError("must be a duration such as 30s, 10m, 2h or 1d")
        return int(match[1]) * _SECONDS[match[2]]
    return value


def parse_duration(text: str) -> int:
    """Seconds of `90s`, `10m`, `2h` or `7d`.

    Raises:
        ConfigError: not a duration.
    """
    try:
        return int(str(_seconds(text)))
    except ValueError as error:
        raise ConfigError(f"{text!r} {error}") from error


def parse_name(text: str) -> str:
    """The name of a silo or a federation.

    Raises:
        ConfigError: it cannot be one.
    """
    if text == AGGREGATOR or not re.fullmatch(NAME_PATTERN, text):
        raise ConfigError(f"{text!r} cannot be a name; use a-z, 0-9 and -, at most 63, not {AGGREGATOR!r}")
    return text


def _silo_name(value: object) -> object:
    if value == AGGREGATOR:
        raise ValueError(f"{AGGREGATOR!r} is the coordinator's own name in the roster; choose another")
    return value


def _number(value: object) -> object:
    """YAML writes 1 for 1.0; booleans stay refused."""
    try:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    except OverflowError as error:
        raise ValueError("is too large") from error


Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN), BeforeValidator(_silo_name)]
Seconds = Annotated[int, BeforeValidator(_seconds)]
Number = Annotated[float, BeforeValidator(_number)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=_PRINTABLE)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Pin = Annotated[str, StringConstraints(pattern=_PIN)]
# Of a key that version 0.1 did not have: where it is not given, it is in no canonical form, and no digest changes.
LATER = Field(exclude_if=_is_absent)


def read_model(path: Path, model: type[M]) -> M:
    """Read `path` as YAML and check it against `model`.

    Raises:
        ConfigError: lists every fault of the file, each with its key and what would be right.
    """
    return check(read_yaml(path), model, str(path))


def check(data: Any, model: type[M], source: str) -> M:
    """Check plain data against `model`; `source` names it in the error."""
    if data is None:
        raise ConfigError(f"{source}: is empty; restore it")
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: must be a mapping of keys to values, found {type(data).__name__}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = "\n".join(f"  {_fault(item)}" for item in error.errors())
        raise ConfigError(f"{source}: {error.error_count()} value(s) cannot be used:\n{faults}") from error


def _fault(item: Any) -> str:
    # The name of a union's branch is pydantic's, not the file's.
    path = [part for i, part in enumerate(item["loc"]) if i == 0 or item["loc"][i - 1] not in _UNIONS]
    key = ".".join(str(part) for part in path if part != "[key]") or "(the whole file)"
    kind, found = item["type"], item["input"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key; check its spelling or remove it"
    if kind == "missing":
        return f"{key}: is missing; add it"
    if isinstance(found, dict) and kind == "value_error":  # which of its values, the words say
        return _in_words(item) if not path else f"{key}: {_in_words(item)}"
    return f"{key}: {_in_words(item)} (found {_short.repr(found)})"


def _in_words(item: Any) -> str:
    kind, details = item["type"], item.get("ctx", {})
    if kind == "string_pattern_mismatch" and details["pattern"] in _PATTERNS:
        return _PATTERNS[details["pattern"]]
    if kind in _IN_WORDS:
        return _IN_WORDS[kind].format(**details).replace("'", "`")
    message = str(item["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
