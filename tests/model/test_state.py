from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from fedclip_secure.errors import ModelError
from fedclip_secure.model.state import AdapterState, Layout
from tests.peak import SLACK, peak

LAYOUT = Layout((("w", (2, 3)), ("scale", ()), ("b", (3,))))
LARGE = Layout(tuple((f"block.{i}", (2, 1_000_000)) for i in range(4)))  # 32 MB
Read = Callable[[bytes], AdapterState]


def _state(layout: Layout = LAYOUT) -> AdapterState:
    return AdapterState(layout, np.arange(layout.size, dtype=np.float32) / np.float32(7))


def from_bytes(data: bytes) -> AdapterState:
    return AdapterState.from_safetensors(data, LAYOUT, "file")


def from_file(data: bytes) -> AdapterState:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return AdapterState.from_file(Path(file.name), LAYOUT, "file")


READERS = [from_bytes, from_file]


def test_size_counts_scalars_as_one() -> None:
    assert LAYOUT.size == 6 + 1 + 3


def test_arrays_cut_the_vector_in_the_order_of_the_layout() -> None:
    arrays = _state().arrays()
    assert {name: array.shape for name, array in arrays.items()} == dict(LAYOUT.entries)
    assert arrays["w"][1, 2] == np.float32(5 / 7)
    assert arrays["scale"] == np.float32(6 / 7)


@pytest.mark.parametrize("read", READERS)
def test_adapter_survives_safetensors_bit_for_bit(read: Read) -> None:
    state = AdapterState(LAYOUT, np.random.default_rng().normal(size=10).astype(np.float32))
    again = read(state.to_safetensors({"a": "b"}))
    assert again.vector.tobytes() == state.vector.tobytes()
    assert again.digest == state.digest


def test_file_holds_the_same_bytes_and_the_library_reads_them(tmp_path: Path) -> None:
    _state().to_file(tmp_path / "new" / "adapter", {"model": "5 é"})
    assert (tmp_path / "new" / "adapter").read_bytes() == _state().to_safetensors({"model": "5 é"})
    with safe_open(tmp_path / "new" / "adapter", "numpy") as file:
        assert file.metadata() == {"model": "5 é"}
        assert {name: file.get_tensor(name).tolist() for name in file.offset_keys()} == {
            name: array.tolist() for name, array in _state().arrays().items()
        }


def test_vector_that_lies_scattered_in_memory_is_written_and_hashed_as_any(tmp_path: Path) -> None:
    scattered = AdapterState(LAYOUT, np.repeat(_state().vector, 2)[::2])
    scattered.to_file(tmp_path / "adapter")
    assert (tmp_path / "adapter").read_bytes() == _state().to_safetensors()
    assert scattered.digest == _state().digest


@pytest.mark.parametrize("read", READERS)
def test_order_in_the_file_does_not_matter(read: Read) -> None:
    arrays = dict(reversed(_state().arrays().items()))
    assert read(save({name: np.asarray(array, order="C") for name, array in arrays.items()})).digest == _state().digest


@pytest.mark.parametrize("read", READERS)
def test_values_of_other_types_are_taken_as_float32(read: Read) -> None:
    arrays = {name: array.astype(np.float64) for name, array in _state().arrays().items()}
    assert read(save({**arrays, "b": np.arange(3, dtype=np.int64)})).vector.tolist() == [*_state().vector[:7], 0, 1, 2]


def test_digest_covers_names_shapes_and_every_value() -> None:
    others = [
        Layout((("v", (2, 3)), ("scale", ()), ("b", (3,)))),
        Layout((("w", (3, 2)), ("scale", ()), ("b", (3,)))),
        Layout((("w", (2, 3)), ("scale", (1,)), ("b", (3,)))),
        Layout((("scale", ()), ("w", (2, 3)), ("b", (3,)))),
    ]
    digests = {_state(layout).digest for layout in [LAYOUT, *others]}
    for index in range(LAYOUT.size):
        vector = _state().vector.copy()
        vector[index] = np.nextafter(vector[index], np.float32(9))
        digests.add(AdapterState(LAYOUT, vector).digest)
    assert len(digests) == 5 + LAYOUT.size


def test_negative_zero_is_another_model() -> None:
    zeros = [AdapterState(LAYOUT, np.full(10, zero, dtype=np.float32)) for zero in (0.0, -0.0)]
    assert zeros[0].digest != zeros[1].digest


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    vector = np.zeros(10, dtype=np.float32)
    vector[7] = value
    with pytest.raises(ModelError, match="NaN or infinity"):
        AdapterState(LAYOUT, vector)


@pytest.mark.parametrize("vector", [np.zeros(9, np.float32), np.zeros(10), np.zeros((2, 5), np.float32)])
def test_vector_of_another_shape_or_type_is_refused(vector: np.ndarray) -> None:
    with pytest.raises(ModelError, match=r"the plan's layout \(10,\) float32"):
        AdapterState(LAYOUT, vector)


@pytest.mark.parametrize("entries", [(), (("a", (1,)), ("a", (2,))), (("a", (0,)),), (("a", (2, -1)),)])
def test_impossible_layout_is_refused(entries: tuple[tuple[str, tuple[int, ...]], ...]) -> None:
    with pytest.raises(ModelError):
        Layout(entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.zeros((3, 2), np.float32)}, r"parameter 'w' has shape \(3, 2\), the plan says \(2, 3\)"),
        ({"x": np.zeros(1, np.float32)}, r"parameter 'x' has shape \(1,\), the plan says \(absent\)"),
        ({"b": np.full(3, np.nan, np.float32)}, "NaN or infinity"),
        ({"b": np.full(3, 1e300)}, "NaN or infinity"),
    ],
)
@pytest.mark.parametrize("read", READERS)
def test_file_of_another_adapter_is_refused_by_name(read: Read, change: dict[str, np.ndarray], message: str) -> None:
    arrays = {name: np.asarray(array, order="C") for name, array in _state().arrays().items()}
    with pytest.raises(ModelError, match=rf"^file: .*{message}"):
        read(save({**arrays, **change}))


@pytest.mark.parametrize("read", READERS)
def test_missing_parameter_is_named(read: Read) -> None:
    with pytest.raises(ModelError, match=r"file: parameter 'w' has shape \(absent\)"):
        read(save({"b": np.zeros(3, np.float32)}))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_file_that_was_cut_is_no_safetensors_file(read: Read, size: int) -> None:
    with pytest.raises(ModelError, match=r"^file: is not a safetensors file .*; get it again$"):
        read(_state().to_safetensors()[:size])


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3", "nonsense"])
def test_values_of_a_type_that_numpy_has_not_are_refused(read: Read, kind: str) -> None:
    size = {"BF16": 2}.get(kind, 1)
    entries = {"w": ([2, 3], 0, 6), "scale": ([], 6, 7), "b": ([3], 7, 10)}
    header = {
        name: {"dtype": kind, "shape": shape, "data_offsets": [start * size, end * size]}
        for name, (shape, start, end) in entries.items()
    }
    text = json.dumps(header).encode()
    with pytest.raises(ModelError, match=r"^file: is not a safetensors file"):
        read(len(text).to_bytes(8, "little") + text + bytes(10 * size))


def test_file_that_cannot_be_opened_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        AdapterState.from_file(tmp_path / "absent", LAYOUT, "file")
    assert missing.value.strerror == "No such file or directory"
    with pytest.raises(IsADirectoryError):
        AdapterState.from_file(tmp_path, LAYOUT, "file")


@given(st.binary(max_size=200) | st.binary(max_size=40).map(lambda tail: len(tail).to_bytes(8, "little") + tail))
@pytest.mark.parametrize("read", READERS)
def test_any_bytes_are_refused_as_no_adapter(read: Read, data: bytes) -> None:
    with pytest.raises(ModelError, match="file: "):
        read(data)


@given(st.integers(0, 300), st.integers(0, 255))
@pytest.mark.parametrize("read", READERS)
def test_flipped_byte_gives_another_digest_or_a_refusal(read: Read, position: int, value: int) -> None:
    data = bytearray(_state().to_safetensors())
    position %= len(data)
    changed = data[position] != value
    data[position] = value
    with contextlib.suppress(ModelError):
        same = read(bytes(data)).digest == _state().digest
        in_header = position < 8 + int.from_bytes(data[:8], "little")
        assert same is not changed or in_header


def _read_hash_and_write(folder: Path) -> None:
    state = AdapterState.from_file(folder / "in", LARGE, "file")
    assert state.digest != bytes(32)
    state.to_file(folder / "out")


def test_large_adapter_is_read_hashed_and_written_in_little_more_memory_than_its_own(tmp_path: Path) -> None:
    vector = np.random.default_rng().normal(size=LARGE.size).astype(np.float32)
    AdapterState(LARGE, vector).to_file(tmp_path / "in")
    assert peak(_read_hash_and_write, tmp_path) < vector.nbytes + vector.nbytes / 4 + SLACK
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in").read_bytes()
