"""Where the mechanism is tested: on which device, how wide, inside which encoder and from which model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedclip_secure.features.encoder import Encoder
from fedclip_secure.model.state import AdapterState

_CPU = torch.device("cpu")
FRESH = "new weights by the plan's seed"


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """Where a plan is trained: at a silo; or, by default, nowhere in particular, on narrow features on the CPU.

    `start` goes with `dim`, or with the plan's own `encoder` where the method trains inside one.
    """

    dim: int | None = None  # of features; None: a narrow one
    device: torch.device = _CPU
    encoder: Encoder | None = None  # the plan's, on `device`; None: a small one with random weights
    start: AdapterState | None = None  # what the silo received; None: initial weights from the plan's seed
    came_from: str = FRESH  # the start, in words
    silo: str | None = None
    received: str | None = None  # digest of the model that the silo has received last

    @property
    def encoder_in_words(self) -> str:
        """What a method that trains inside an encoder has for one."""
        return "a small random encoder" if self.encoder is None else f"the plan's encoder {self.encoder.lock.name}"

    def narrow(self, dim: int | None = None) -> Setting:
        """The same on other features, where no model that was received fits."""
        return replace(self, dim=dim, encoder=None, start=None, came_from=FRESH)
