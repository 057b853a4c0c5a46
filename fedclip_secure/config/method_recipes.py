"""What `init` writes into a new plan for each method: values to start from, with which it can be trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedclip_secure.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Noise:
    """The example of a `privacy` block, which begins as a comment."""

    sample_rate: float = 0.05
    steps_per_round: int = 10
    max_grad_norm: float = 1.0
    update_divisor: float = 60.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """Values of one method, as they stand in YAML. `options` go into the `method` block, after its name."""

    optimizer: str = "{name: adam, lr: 1e-3}"
    rounds: int = 50
    batch_size: int = 32
    coordinate_clip: float = 0.5
    weights: str = "masked"
    options: str = ""
    noise: Noise = field(default_factory=Noise)

    def values(self, method: str) -> dict[str, str]:
        """By placeholder of the template."""
        return {
            "{method}": f'{{name: "{method}"{self.options}}}',
            "{rounds}": str(self.rounds),
            "{batch_size}": str(self.batch_size),
            "{optimizer}": self.optimizer,
            "{coordinate_clip}": f"{self.coordinate_clip:g}",
            "{weights}": self.weights,
            "{sample_rate}": f"{self.noise.sample_rate:g}",
            "{steps_per_round}": str(self.noise.steps_per_round),
            "{max_grad_norm}": f"{self.noise.max_grad_norm:g}",
            "{update_divisor}": f"{self.noise.update_divisor:g}",
        }


_FEDCLIP = Recipe("{name: adam, lr: 5e-5}", coordinate_clip=0.1)
_TOWER = Recipe(rounds=20)
_WHOLE = Recipe("{name: adam, lr: 1e-5}", rounds=20, coordinate_clip=0.1)
_DOMAINS = ", domains: {here: [silo-a], there: [silo-b, silo-c]}"
RECIPES: Mapping[str, Recipe] = {
    "fedclip": _FEDCLIP,
    "linear_probe": Recipe(),
    "private_prototypes": Recipe("{name: sgd, lr: 0.2}", 1, 1, 100.0, "equal", noise=Noise(1.0, 1, 1.0, 5.0)),
    "discriminant": Recipe("{name: sgd, lr: 1.0}", 1, 1, 10_000.0, "equal", noise=Noise(1.0, 1, 1.9531, 1.0)),
    "fedtune:text_context": Recipe(),
    "fedtune:text_bias": Recipe(),
    "fedtune:visual_prompt": _TOWER,
    "fedtune:visual_prompt_deep": _TOWER,
    "fedtune:adapter": _TOWER,
    "fedtune:visual_bias": _TOWER,
    "fedtune:layernorm": _TOWER,
    "fedtune:lora": _TOWER,
    "fedtune:head": Recipe(),
    "fedtune:full": _WHOLE,
    "fedavg_full": _WHOLE,
    "fedprox_full": _WHOLE,
    "fedapt": Recipe(options=_DOMAINS),
    "feddat": Recipe(rounds=20),
}


def recipe_of(method: str) -> Recipe:
    """What `init` writes for a method.

    Raises:
        ConfigError: there is no such method, and lists those there are.
    """
    if method not in RECIPES:
        raise ConfigError(f"--method {method}: is unknown to this version; it has {', '.join(RECIPES)}")
    return RECIPES[method]
