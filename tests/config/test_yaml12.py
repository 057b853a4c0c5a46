from __future__ import annotations

import contextlib
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclip_secure.config.yaml12 import read_yaml, replace_scalar
from fedclip_secure.errors import ConfigError

PIN = "sha256:" + "ab" * 32


def _read(tmp_path: Path, text: str | bytes) -> Any:
    path = tmp_path / "file.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-0.0", -0.0),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("010", 10),
        ("0o10", 8),
        ("0x10", 16),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-01-02", "2026-01-02"),
        ("0b1", "0b1"),
        ("10m", "10m"),
        ("-.inf", -math.inf),
        ("'1'", "1"),
        ("=", "="),
    ],
)
def test_scalars_follow_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    found = _read(tmp_path, f"key: {text}\n")["key"]
    assert found == value
    assert type(found) is type(value)


def test_nan_is_a_number(tmp_path: Path) -> None:
    assert math.isnan(_read(tmp_path, "key: .nan")["key"])


def test_merge_key_is_an_ordinary_key(tmp_path: Path) -> None:
    assert _read(tmp_path, "a: {<<: {b: 1}}") == {"a": {"<<": {"b": 1}}}


def test_mapping_keeps_its_order(tmp_path: Path) -> None:
    assert list(_read(tmp_path, "{b: 1, a: 2, c: 3}")) == ["b", "a", "c"]


def test_alias_stands_for_its_anchor(tmp_path: Path) -> None:
    assert _read(tmp_path, "a: &x [1]\nb: *x") == {"a": [1], "b": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' stands here a second time"),
        ("a:\n  b: 1\n  b: 1", "line 3, column 3: the key 'b'"),
        ("a: !!python/object:os.system {}", "line 1, column 4: the tag .* tags are not used, remove it"),
        ("a: !!bool maybe", "tags are not used"),
        ("a: !!timestamp soon", "tags are not used"),
        ("a: !!int x", "tags are not used"),
        ("a: !mine 1", "tags are not used"),
        ("? [1]\n: 2", "a key must be plain text"),
        ("a: [1", "line 1, column 6"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: &x [*x]", "recursive"),
        ("a: *x", "line 1, column 4.*undefined alias"),
        ("\tb: 1", "line 1, column 1"),
        ("a: \x00", "not valid YAML"),
        ("[" * 20000, "nested too deeply"),
        ("- " * 20000, "nested too deeply"),
        ("a: " + "9" * 5000, "integer of so many digits"),
        ("a: 0x" + "f" * 9000, "integer of so many digits"),
        (b"a: \xff\xfe", "is not UTF-8"),
        ("a: 1".encode("utf-16"), "is not UTF-8"),
    ],
)
def test_bad_yaml_is_refused_with_file_and_place(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"file\.yaml: (?s:.*){message}"):
        _read(tmp_path, text)


def test_missing_file_and_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=f"{path.name}': cannot be read"):
            read_yaml(path)


@given(st.binary(max_size=60) | st.text(alphabet="ab:-[]{}&*!|>#'\"? \n,%@`\\0x.", max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(ConfigError):
            read_yaml(Path(file.name))


# replace_scalar


def _replace(tmp_path: Path, text: str) -> str:
    path = tmp_path / "silo.yaml"
    path.write_bytes(text.encode())
    return replace_scalar(path, "plan", PIN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plan: old\n", "plan: NEW\n"),
        ("plan: old", "plan: NEW"),
        ("plan: 'old'  # why\nroster: x\n", "plan: NEW  # why\nroster: x\n"),
        ('plan: "old"\n', "plan: NEW\n"),
        ('"plan": old\n', '"plan": NEW\n'),
        ("plan:\nroster: x\n", "plan: NEW\nroster: x\n"),
        ("plan:   # by accept\n", "plan: NEW   # by accept\n"),
        ("plan: null\n", "plan: NEW\n"),
        ("plan :   ~\n", "plan :   NEW\n"),
        ("# plan: old\nname: a\n", "# plan: old\nname: a\nplan: NEW\n"),
        ("name: a\nother: {plan: old}\n", "name: a\nother: {plan: old}\nplan: NEW\n"),
        ("name: a  # end", "name: a  # end\nplan: NEW\n"),
        ("name: plan\n", "name: plan\nplan: NEW\n"),
        ("name: a\r\nplan: old\r\n# end\r\n", "name: a\r\nplan: NEW\r\n# end\r\n"),
        ("name: a\r\n", "name: a\r\nplan: NEW\r\n"),
        ("\ufeffname: a\nplan: old\n", "\ufeffname: a\nplan: NEW\n"),
        ("name: übermäßig 𝔘\nplan: old # 𝔘\n", "name: übermäßig 𝔘\nplan: NEW # 𝔘\n"),
        ("", "plan: NEW\n"),
        ("# only this\n", "# only this\nplan: NEW\n"),
        ("{name: a, plan: old}\n", "{name: a, plan: NEW}\n"),
    ],
)
def test_one_value_is_set_and_all_else_stays(tmp_path: Path, text: str, expected: str) -> None:
    assert _replace(tmp_path, text) == expected.replace("NEW", PIN)


@pytest.mark.parametrize(
    "text",
    ["{name: a}\n", "  name: a\n", "name: a\n...\n", "plan: |-\n  old\nroster: x\n", "- a\n", "a: [\n", "a: 1\na: 2\n"],
)
def test_file_without_a_place_for_the_key_is_left_alone_and_says_what_to_add(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=f"silo.yaml: has no place.*\nplan: {PIN}"):
        _replace(tmp_path, text)
    assert (tmp_path / "silo.yaml").read_bytes() == text.encode()


_WORDS = st.text(alphabet="abcxyz09-äß", min_size=1, max_size=6).filter(lambda word: not word.startswith("-"))
_LINES = st.one_of(
    st.builds(lambda word: f"# {word}", st.text(alphabet="ab: {}[]'\"#", max_size=10)),
    st.just(""),
    st.builds("k{}: {}".format, st.integers(0, 10**9), _WORDS),
    st.builds("k{}: '{}'  # {}".format, st.integers(0, 10**9), _WORDS, _WORDS),
    st.builds("k{}:\n  - {}\n  - {{plan: {}}}".format, st.integers(0, 10**9), _WORDS, _WORDS),
)


@given(st.lists(_LINES, max_size=5), st.lists(_LINES, max_size=5), st.sampled_from(["x", "'x'", '"x"', "", "~ # y"]))
def test_any_file_keeps_every_byte_but_the_value(before: list[str], after: list[str], value: str) -> None:
    head, tail = "".join(f"{line}\n" for line in before), "".join(f"\n{line}" for line in after)
    text = f"{head}plan: {value}{tail}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "silo.yaml")
        path.write_bytes(text.encode())
        try:
            read_yaml(path)
        except ConfigError:  # two keys of one name
            return
        edited = replace_scalar(path, "plan", PIN)
    assert edited.startswith(f"{head}plan: {PIN}")
    assert edited.endswith(tail)
    comment = " # y" if value == "~ # y" else ""
    assert edited.removeprefix(f"{head}plan: {PIN}").removesuffix(tail).strip() == comment.strip()
