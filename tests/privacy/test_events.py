from __future__ import annotations

import math
import subprocess
import sys

import pytest

from fedclip_secure.errors import ConfigError
from fedclip_secure.privacy.accounting.events import Event, merged
from tests.waiting import BOUND


@pytest.mark.parametrize("sigma", [0.0, -1.0, 1e-154, 1e7, math.inf, math.nan])
def test_noise_that_is_none_or_no_number_is_refused_with_the_remedy(sigma: float) -> None:
    with pytest.raises(ConfigError, match=r"cannot be accounted for; give a value from 0.001 to 1e\+06"):
        Event(sigma, 0.1, 1)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, math.inf, math.nan])
def test_sample_rate_that_is_no_probability_is_refused_with_the_remedy(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"sample_rate .* give 0 < q <= 1"):
        Event(1.0, rate, 1)


@pytest.mark.parametrize("steps", [0, -3, 1.5, True, math.nan])
def test_steps_that_cannot_be_counted_are_refused_with_the_remedy(steps: int) -> None:
    with pytest.raises(ConfigError, match=r"steps .* whole number of at least 1"):
        Event(1.0, 0.1, steps)


def test_unknown_mechanism_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'shuffled_gaussian' is unknown.*'poisson_gaussian'"):
        Event(1.0, 0.1, 1, "shuffled_gaussian")


def test_merging_adds_up_equal_parameters_and_forgets_the_order() -> None:
    events = [Event(2.0, 0.1, 3), Event(1.0, 0.2, 4), Event(2.0, 0.1, 5), Event(1.0, 0.1, 6)]
    expected = (Event(1.0, 0.1, 6), Event(1.0, 0.2, 4), Event(2.0, 0.1, 8))
    assert merged(events) == merged(reversed(events)) == expected
    assert merged([]) == ()


@pytest.mark.parametrize("module", ["events", "rdp", "privacy_filter"])
def test_what_must_start_fast_loads_neither_scipy_nor_dp_accounting(module: str) -> None:
    name = f"fedclip_secure.privacy.accounting.{module}"
    code = f"import sys, {name}; print({{'scipy', 'dp_accounting'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=BOUND)
    assert done.stdout.strip() == "set()"
