from __future__ import annotations

import math
import re
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclip_secure.errors import ConfigError, ProtocolError
from fedclip_secure.secagg.ring import CLAMPED_AT_MOST, FixedPoint, Total, VectorLayout, Words, read_total

GRID = FixedPoint(clip=0.1, silos=5, max_weight=1000)
EXACT = FixedPoint(clip=((2**29 - 1) // 4) * 2.0**-40, silos=4, max_weight=1)  # a step of 2^-40: products are exact
LAYOUT = VectorLayout(parameters=4, counts=True)
CHUNK = 1 << 15  # coordinates that are rounded at a time
BORDERS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 7]


def signed(words: Words) -> list[int]:
    return [int(value) for value in words.view(np.int32)]


def total_of(update: list[int], weight: int, correct: int = 0, total: int = 0, silos: int = 3) -> Total:
    words = np.array([*update, weight, correct, total], dtype=np.int64).astype(np.uint32)
    return read_total(words, LAYOUT, GRID, silos)


@pytest.mark.parametrize("silos", [3, 4, 5, 10, 255])
def test_the_bound_is_that_of_the_protocol(silos: int) -> None:
    assert FixedPoint(0.1, silos, 1).bound == math.floor((2**29 - 1) / silos)


@pytest.mark.parametrize("silos", [3, 255])
@pytest.mark.parametrize("clip", [0.1, 1 / 3, 1e-9, 7e5])
def test_no_sum_of_all_silos_at_the_extremes_wraps(silos: int, clip: float) -> None:
    grid = FixedPoint(clip, silos, 1000)
    extremes = signed(grid.quantize(np.array([clip, -clip, clip, -clip]), 1000))
    assert max(map(abs, extremes)) <= grid.bound
    assert max(map(abs, extremes)) * silos < 2**29


def test_a_quantized_update_is_one_of_its_two_neighbours() -> None:
    values = np.random.default_rng(1).uniform(-0.1, 0.1, 10_000)
    exact = 7 * values / (GRID.step * 1000)
    assert np.abs(GRID.quantize(values, 7).view(np.int32) - exact).max() < 1


def test_rounding_is_unbiased() -> None:
    # 400,000 draws at a third of a step: the mean's standard error is 0.00075, the tolerance 6 of them.
    third = np.full(400_000, GRID.step / 3)
    assert GRID.quantize(third, 1000).view(np.int32).mean() == pytest.approx(1 / 3, abs=0.0045)
    assert GRID.quantize(-third, 1000).view(np.int32).mean() == pytest.approx(-1 / 3, abs=0.0045)


def test_integers_on_the_grid_are_not_rounded_at_all() -> None:
    grid = FixedPoint(clip=2.0**-4, silos=4, max_weight=1)
    # A power of two for the clip and a step taken from it, so that the products are exact.
    values = np.arange(-3, 4) * grid.step
    assert signed(grid.quantize(values, 1)) == [-3, -2, -1, 0, 1, 2, 3]


@pytest.mark.parametrize("length", BORDERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_long_update_on_the_grid_is_not_rounded_in_any_chunk(length: int, dtype: npt.DTypeLike) -> None:
    integers = np.random.default_rng(2).integers(-(2**23), 2**23, length)
    update = (integers * EXACT.step).astype(dtype)
    assert np.array_equal(EXACT.quantize(update, 1).view(np.int32), integers)


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_no_random_word_moves_what_lies_on_the_grid(word: int) -> None:
    # A word is zero once in 2^32: too seldom to wait for, often enough in a vector of 1.5e8 coordinates.
    integers = np.array([-3, -1, 0, 1, 2**20])
    words = np.full(5, word, dtype=np.uint32)
    assert EXACT._round(integers * EXACT.step, 1, words).tolist() == integers.tolist()


@pytest.mark.parametrize("length", BORDERS)
def test_every_coordinate_of_a_long_update_is_one_of_its_two_neighbours(length: int) -> None:
    values = np.random.default_rng(3).uniform(-0.1, 0.1, length).astype(np.float32)
    exact = 333 * values.astype(np.float64) / (GRID.step * 1000)
    rounded = GRID.quantize(values, 333).view(np.int32)
    assert rounded.shape == (length,)
    assert ((rounded == np.floor(exact)) | (rounded == np.ceil(exact))).all()


def test_no_two_chunks_are_rounded_with_the_same_draws() -> None:
    ups = GRID.quantize(np.full(4 * CHUNK, GRID.step / 2), 1000).reshape(4, CHUNK)
    assert len({part.tobytes() for part in ups}) == 4


@pytest.mark.parametrize("remainder", [2.0**-31, 0.001, 0.5, 0.999])
def test_a_remainder_rounds_up_as_often_as_it_says(remainder: float) -> None:
    draws = 1_000_000
    ups = EXACT.quantize(np.full(draws, (7 + remainder) * EXACT.step), 1).view(np.int32) - 7
    assert abs(int(ups.sum()) - draws * remainder) <= 6 * math.sqrt(draws * remainder * (1 - remainder)) + 1


def test_an_update_that_lies_in_a_file_is_read_in_place(tmp_path: Path) -> None:
    integers = np.random.default_rng(4).integers(-1000, 1000, 2 * CHUNK + 3)
    (integers * EXACT.step).astype("<f4").tofile(tmp_path / "update")
    update = np.memmap(tmp_path / "update", dtype="<f4", mode="r")
    words = EXACT.quantize(update, 1)
    assert type(words) is np.ndarray
    assert np.array_equal(words.view(np.int32), integers)


def test_rounding_takes_the_memory_of_its_result_alone() -> None:
    update = np.random.default_rng(5).uniform(-0.1, 0.1, 4_000_000).astype(np.float32)
    tracemalloc.start()
    try:
        words = GRID.quantize(update, 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < words.nbytes + 4_000_000


def test_zero_stays_zero_so_a_closing_round_moves_nothing() -> None:
    assert not GRID.quantize(np.zeros(100_000), 1000).any()


def test_two_draws_differ() -> None:
    values = np.full(1000, GRID.step / 2)
    assert signed(GRID.quantize(values, 1000)) != signed(GRID.quantize(values, 1000))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_nan_or_infinity_leaves(value: float) -> None:
    with pytest.raises(ProtocolError, match="NaN or infinity and was not sent") as refused:
        GRID.quantize(np.array([0.0] * 10_000 + [value]), 1)
    assert refused.value.code == "not-finite"


@pytest.mark.parametrize("where", [0, CHUNK - 1, CHUNK, 2 * CHUNK])
def test_a_nan_in_any_chunk_is_told_before_a_clip(where: int) -> None:
    values = np.full(2 * CHUNK + 1, 5.0, dtype=np.float32)
    values[where] = math.nan
    with pytest.raises(ProtocolError, match="NaN or infinity"):
        GRID.quantize(values, 1)


def test_coordinates_beyond_the_clip_are_counted_over_all_chunks() -> None:
    values = np.zeros(4000 * 25)
    values[::1000] = 0.15
    GRID.quantize(values, 1)
    values[-1] = 0.15
    with pytest.raises(ProtocolError, match=r"0\.1% of the .*coordinate_clip: 0\.15 would fit") as refused:
        GRID.quantize(values, 1)
    assert refused.value.code == "clip"


def test_one_coordinate_in_a_thousand_may_clamp_and_comes_out_at_the_clip() -> None:
    values = np.zeros(1000)
    values[3] = 5.0
    assert signed(GRID.quantize(values, 1000))[3] == GRID.bound


def test_two_coordinates_in_a_thousand_beyond_the_clip_are_refused() -> None:
    values = np.zeros(1000)
    values[3], values[4] = 0.25, -0.25
    with pytest.raises(ProtocolError, match=r"coordinate_clip: 0\.25 would fit") as refused:
        GRID.quantize(values, 1000)
    assert refused.value.code == "clip"


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    st.integers(0, 3000),
)
def test_the_clip_that_is_named_fits(large: list[float], zeros: int) -> None:
    values = np.array([*large, *[0.0] * zeros])
    try:
        GRID.quantize(values, 1)
        return
    except ProtocolError as error:
        named = re.search(r"coordinate_clip: (\S+) would fit", str(error))
    assert named is not None
    clip = float(named.group(1))
    assert np.count_nonzero(np.abs(values) > clip) <= CLAMPED_AT_MOST * values.size
    FixedPoint(clip, 5, 1000).quantize(values, 1)


def test_the_clip_that_is_named_fits_a_short_vector_too() -> None:
    with pytest.raises(ProtocolError, match=r"coordinate_clip: 0\.21 would fit"):
        GRID.quantize(np.array([0.2001, 0.1, 0, 0, 0, 0, 0, 0]), 1)


@pytest.mark.parametrize("weight", [0, -1, 1001])
def test_a_weight_outside_the_plan_is_refused_before_it_is_sent(weight: int) -> None:
    with pytest.raises(ValueError, match=r"is not in 1\.\.1000"):
        GRID.quantize(np.zeros(4), weight)


@pytest.mark.parametrize("clip", [0.0, -0.1, math.inf, math.nan])
def test_a_clip_that_is_no_positive_number_is_refused(clip: float) -> None:
    with pytest.raises(ConfigError, match="must be a positive number"):
        FixedPoint(clip, 5, 1000)


def test_a_grid_that_could_overflow_is_refused() -> None:
    bound = (2**29 - 1) // 255
    assert FixedPoint(0.1, 255, bound).max_weight == bound
    for weight in (0, bound + 1):
        with pytest.raises(ConfigError, match=rf"must lie in 1\.\.{bound} for 255 silos"):
            FixedPoint(0.1, 255, weight)


def test_a_grid_for_two_silos_is_refused() -> None:
    with pytest.raises(ConfigError, match="each can subtract itself"):
        FixedPoint(0.1, 2, 1)


@pytest.mark.parametrize(("counts", "words"), [(True, 7), (False, 5)])
def test_weight_and_counts_stand_behind_the_update(counts: bool, words: int) -> None:
    layout, update = VectorLayout(4, counts), np.array([1, 2, 3, 4], dtype=np.uint32)
    packed = layout.pack(update, 9, 5, 8) if counts else layout.pack(update, 9)
    assert packed.tolist() == [1, 2, 3, 4, 9, 5, 8][:words]
    assert packed.dtype == np.uint32
    assert layout.words == words


def test_a_total_is_read_as_it_was_packed() -> None:
    total = total_of([-5, 0, 7, 1], 30, 4, 9)
    assert (total.update.tolist(), total.weight, total.correct, total.total) == ([-5, 0, 7, 1], 30, 4, 9)


def test_a_total_is_a_view_of_words_that_nobody_may_write() -> None:
    words = np.array([2**32 - 5, 0, 7, 1, 30, 4, 9], dtype=np.uint32)
    words.flags.writeable = False
    total = read_total(words, LAYOUT, GRID, 3)
    assert np.shares_memory(total.update, words)
    assert total.update.tolist() == [-5, 0, 7, 1]


def test_a_total_without_counts_has_none() -> None:
    words = np.array([1, 2, 3, 4, 30], dtype=np.uint32)
    total = read_total(words, VectorLayout(4, counts=False), GRID, 3)
    assert (total.weight, total.correct, total.total) == (30, 0, 0)


@pytest.mark.parametrize("weight", [3, 3000])
def test_the_least_and_the_largest_weight_are_accepted(weight: int) -> None:
    assert total_of([0, 0, 0, 0], weight).weight == weight


@pytest.mark.parametrize("weight", [0, 2, 3001, -1, -30, 2**31 - 1])
def test_a_weight_that_three_silos_cannot_have_is_refused(weight: int) -> None:
    with pytest.raises(ProtocolError, match="weights of 3 silos add up to") as refused:
        total_of([0, 0, 0, 0], weight)
    assert refused.value.code == "sum-bounds"


@pytest.mark.parametrize("weight", [3, 30, 3000])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_coordinate_is_bounded_by_the_weight_to_the_unit(weight: int, sign: int) -> None:
    # |sum| * max_weight <= Q * W + m * max_weight
    most = (GRID.bound * weight + 3 * 1000) // 1000
    total_of([0, sign * most, 0, 0], weight)
    with pytest.raises(ProtocolError, match="beyond the clip"):
        total_of([0, sign * (most + 1), 0, 0], weight)


def test_the_smallest_word_has_no_magnitude_that_slips_through() -> None:
    for update in ([-(2**31), 0, 0, 0], [-(2**31)] * 4, [0, 0, 2**31 - 1, -(2**31)]):
        with pytest.raises(ProtocolError, match="beyond the clip"):
            total_of(update, 3000)


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (-1, 5), (0, -1), (6, 5), (0, 3 * GRID.bound + 1)])
def test_counts_that_cannot_be_are_refused(correct: int, total: int) -> None:
    with pytest.raises(ProtocolError, match="validation counts add up to") as refused:
        total_of([0, 0, 0, 0], 30, correct, total)
    assert refused.value.code == "sum-bounds"


def test_honest_extremes_never_break_the_bounds() -> None:
    for weights in ([1, 1, 1], [1, 1000, 7], [1000, 1000, 1000]):
        packed = [LAYOUT.pack(GRID.quantize(np.full(4, 0.1), w), w, 2, 2) for w in weights]
        total = read_total(sum(packed[1:], packed[0]), LAYOUT, GRID, 3)
        mean = GRID.mean(total.update, total.weight)
        assert np.abs(mean - 0.1).max() <= GRID.error_bound(3, sum(weights))


def test_the_mean_stays_within_the_clip_and_the_rounding_whoever_lies() -> None:
    for weight in (3, 500, 3000):
        most = (GRID.bound * weight + 3 * 1000) // 1000
        mean = GRID.mean(np.array([most, -most]), weight)
        assert np.abs(mean).max() <= 0.1 + GRID.error_bound(3, weight)
