from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from fedclip_secure.errors import ModelError
from fedclip_secure.model.state import AdapterState, Layout

LAYOUT = Layout((("w", (2, 3)), ("scale", ()), ("b", (3,))))


def _state(layout: Layout = LAYOUT) -> AdapterState:
    return AdapterState(layout, np.arange(layout.size, dtype=np.float32) / np.float32(7))


def test_size_counts_scalars_as_one() -> None:
    assert LAYOUT.size == 6 + 1 + 3


def test_arrays_cut_the_vector_in_the_order_of_the_layout() -> None:
    arrays = _state().arrays()
    assert {name: array.shape for name, array in arrays.items()} == dict(LAYOUT.entries)
    assert arrays["w"][1, 2] == np.float32(5 / 7)
    assert arrays["scale"] == np.float32(6 / 7)


def test_adapter_survives_safetensors_bit_for_bit() -> None:
    state = AdapterState(LAYOUT, np.random.default_rng().normal(size=10).astype(np.float32))
    again = AdapterState.from_safetensors(state.to_safetensors({"a": "b"}), LAYOUT, "file")
    assert again.vector.tobytes() == state.vector.tobytes()
    assert again.digest == state.digest


def test_order_in_the_file_does_not_matter() -> None:
    arrays = dict(reversed(_state().arrays().items()))
    data = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    assert AdapterState.from_safetensors(data, LAYOUT, "file").digest == _state().digest


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
def test_file_of_another_adapter_is_refused_by_name(change: dict[str, np.ndarray], message: str) -> None:
    arrays = {name: np.asarray(array, order="C") for name, array in _state().arrays().items()}
    with pytest.raises(ModelError, match=rf"^file: .*{message}"):
        AdapterState.from_safetensors(save({**arrays, **change}), LAYOUT, "file")


def test_missing_parameter_is_named() -> None:
    with pytest.raises(ModelError, match=r"file: parameter 'w' has shape \(absent\)"):
        AdapterState.from_safetensors(save({"b": np.zeros(3, np.float32)}), LAYOUT, "file")


@given(st.binary(max_size=200) | st.binary(max_size=40).map(lambda tail: len(tail).to_bytes(8, "little") + tail))
def test_any_bytes_are_refused_as_no_adapter(data: bytes) -> None:
    with pytest.raises(ModelError, match="file: "):
        AdapterState.from_safetensors(data, LAYOUT, "file")


@given(st.integers(0, 300), st.integers(0, 255))
def test_flipped_byte_gives_another_digest_or_a_refusal(position: int, value: int) -> None:
    data = bytearray(_state().to_safetensors())
    position %= len(data)
    changed = data[position] != value
    data[position] = value
    with contextlib.suppress(ModelError):
        same = AdapterState.from_safetensors(bytes(data), LAYOUT, "file").digest == _state().digest
        in_header = position < 8 + int.from_bytes(data[:8], "little")
        assert same is not changed or in_header
