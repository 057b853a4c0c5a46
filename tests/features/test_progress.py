from __future__ import annotations

from fedclip_secure.features.progress import Meter, Progress


class Steps:
    """A meter over a clock that the test sets, and what it showed."""

    def __init__(self, total: int, cached: int) -> None:
        self.now = 100.0
        self.shown: list[Progress] = []
        self.meter = Meter(total, cached, self.shown.append, lambda: self.now)

    def after(self, seconds: float, images: int, broken: int = 0) -> Progress:
        self.now += seconds
        self.meter.advance(images, broken=broken)
        return self.shown[-1]


def test_speed_and_time_left_count_only_what_was_done_here() -> None:
    steps = Steps(total=1000, cached=900)
    assert steps.shown == [Progress(900, 1000, 900, 0, None, None)]
    assert steps.after(2, 20) == Progress(920, 1000, 900, 0, 10.0, 8.0)


def test_speed_is_the_recent_one() -> None:
    steps = Steps(total=10_000, cached=0)
    for _ in range(10):
        steps.after(10, 1)
    for _ in range(4):
        fast = steps.after(10, 100)
    assert fast.images_per_second == 10.0


def test_one_long_batch_has_a_speed_too() -> None:
    assert Steps(total=100, cached=0).after(100, 50).images_per_second == 0.5


def test_no_time_passed_gives_no_speed() -> None:
    assert Steps(total=10, cached=0).after(0, 5) == Progress(5, 10, 0, 0, None, None)


def test_broken_images_add_up() -> None:
    steps = Steps(total=10, cached=0)
    steps.after(1, 5, broken=2)
    assert steps.after(1, 5, broken=1).broken == 3
