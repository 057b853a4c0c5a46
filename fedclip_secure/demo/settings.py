"""How the demo trains each method: its options, optimiser, rounds and grid, without privacy and with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedclip_secure.errors import ConfigError
from fedclip_secure.methods.discriminant import GRADIENT_NORM
from fedclip_secure.methods.registry import METHODS

Optimizer = Mapping[str, Any]


def _adam(lr: float) -> Optimizer:
    return {"name": "adam", "lr": lr}


def _sgd(lr: float) -> Optimizer:
    return {"name": "sgd", "lr": lr}


@dataclass(frozen=True, slots=True)
class Private:
    """What takes the place of a method's own with --dp. None of it follows from how many images a lab has."""

    optimizer: Optimizer = field(default_factory=lambda: _sgd(1.0))
    sample_rate: float = 0.5
    steps: int = 4  # of a round
    max_grad_norm: float = 1.0
    divisor: float = 150.0
    coordinate_clip: float = 2.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one method. `name` and `options` are the plan's, where they are not what the demo calls the method."""

    optimizer: Optimizer = field(default_factory=lambda: _adam(1e-3))
    rounds: int = 20
    batch_size: int = 32  # records
    coordinate_clip: float = 0.1
    weights: str = "masked"
    private: Private | None = field(default_factory=Private)
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None

    @property
    def one_sum(self) -> bool:
        """Whether there is nothing to learn in a second round."""
        return self.rounds == 1


# One step for each record, whose order makes no difference: the update is the sum over the records, to the last one.
_LARGEST = 10_000.0  # records of a lab whose sums still fit the grid
_PROTOTYPES = Settings(
    _sgd(0.2), rounds=1, batch_size=1, coordinate_clip=20.0, weights="equal",
    private=Private(_sgd(1.0), sample_rate=1.0, steps=1, divisor=5.0),  # five records weigh as much as a class's text
)  # fmt: skip
_DISCRIMINANT = Settings(
    _sgd(1.0), rounds=1, batch_size=1, coordinate_clip=_LARGEST, weights="equal",
    private=Private(_sgd(1.0), 1.0, 1, GRADIENT_NORM, 1.0, _LARGEST),
)  # fmt: skip
_PROBE = Settings(private=Private(_adam(3e-3), sample_rate=1.0, steps=2, divisor=300.0))
_TEXT = Settings(_adam(3e-3), private=Private(_sgd(0.1)))
# A step through a visual tower takes some hundred times as long as one on features.
_VISUAL = Settings(rounds=6, private=Private(steps=2))
# Small steps, or the encoder forgets what it knew; noise on millions of parameters would bury some hundred images.
_WHOLE = Settings(_adam(3e-4), rounds=4, private=None)

# Of methods that train otherwise than `Settings()` says.
_SETTINGS: dict[str, Settings] = {
    "linear_probe": _PROBE,
    "private_prototypes": _PROTOTYPES,
    "discriminant": _DISCRIMINANT,
    "fedtune:text_context": _TEXT,
    "fedtune:text_bias": _TEXT,
    "fedtune:visual_prompt": _VISUAL,
    "fedtune:visual_prompt_deep": _VISUAL,
    "fedtune:adapter": _VISUAL,
    "fedtune:visual_bias": _VISUAL,
    "fedtune:layernorm": _VISUAL,
    "fedtune:lora": _VISUAL,
    "fedtune:head": _PROBE,
    "fedtune:full": _WHOLE,
    "fedavg_full": _WHOLE,
    "fedprox_full": _WHOLE,
    "fedapt": _TEXT,
    "feddat:blocks": Settings(rounds=4, private=Private(steps=2), name="feddat", options={"place": "blocks"}),
}
METHOD_NAMES = tuple(dict.fromkeys([*METHODS, *_SETTINGS]))  # what --method takes


def settings_of(method: str) -> Settings:
    """What --method names.

    Raises:
        ConfigError: the demo has no such method, and lists those it has.
    """
    if method not in METHOD_NAMES:
        raise ConfigError(f"--method {method}: is unknown to this version; it has {', '.join(METHOD_NAMES)}")
    return _SETTINGS.get(method, Settings())


def method_block(method: str, silos: Sequence[str]) -> dict[str, Any]:
    """The plan's `method`. Of FedAPT's domains each lab is one: their scanners differ."""
    settings = settings_of(method)
    domains = {"domains": {silo: [silo] for silo in silos}} if method == "fedapt" else {}
    return {"name": settings.name or method, **settings.options, **domains}
