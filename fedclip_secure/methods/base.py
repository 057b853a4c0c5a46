"""What a method says about itself, so that one engine can run them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import field_validator
from torch import Tensor, nn

from fedclip_secure.config.fields import Strict
from fedclip_secure.config.method_needs import Need
from fedclip_secure.data.dataset import Task
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.features.stage import FEATURES, Stage


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B records with their task.

    Attributes:
        images: what the method takes: features (B, D), tokens (B, N, W) or pixels (B, 3, S, S).
        labels: (B,).
        text_features: (C, D) of norm 1; (0, D) where the encoder reads no text.
        logit_scale: CLIP's; 1 where the encoder reads no text.
    """

    images: Tensor
    labels: Tensor
    text_features: Tensor
    logit_scale: float


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """The facts about a method that the engine goes by."""

    inputs: frozenset[str]  # of image_features, text_features, tokens, pixels
    backprop: str  # none | text | visual | both: what a step must run through
    shared: tuple[str, ...]  # patterns (fnmatch) of names of trained parameters that travel
    private: tuple[str, ...]  # patterns of those that are trained here and never sent
    per_record_loss: bool  # False: the loss couples the records of a batch
    private_feeds_shared: bool  # True: the private part decides gradients of the shared one
    one_sum: bool = False  # True: one step of plain SGD over all records is all there is to learn
    needs: tuple[Need, ...] = ()  # of the rest of the plan
    first_block: int = 0  # of the visual tower that the method runs, where it takes tokens

    @property
    def stage(self) -> Stage:
        """What the engine keeps of each image."""
        if "tokens" in self.inputs:
            return Stage("tokens", self.first_block)
        return Stage("pixels") if "pixels" in self.inputs else FEATURES


@dataclass(frozen=True, slots=True)
class Phase:
    """One optimisation: which `parameters` (patterns) take steps on which `loss`: (model, batch) -> (B,)."""

    parameters: tuple[str, ...]
    loss: Callable[[nn.Module, Batch], Tensor]


class Method(Strict, ABC):
    """A method. Its fields are its options: the keys of the plan's `method` block beside `name`."""

    losses: ClassVar[tuple[str, ...]] = ("cross_entropy",)
    has_head: ClassVar[bool] = False  # True: where the encoder reads no text, it learns a head, and needs none

    loss: Literal["cross_entropy", "inbatch"] = "cross_entropy"

    @field_validator("loss")
    @classmethod
    def _one_of_its_own(cls, value: str) -> str:
        if value not in cls.losses:
            raise ValueError(f"this method has {' and '.join(cls.losses)} only; leave `loss` out")
        return value

    @property
    @abstractmethod
    def spec(self) -> MethodSpec:
        """Facts that hold for these options."""

    @abstractmethod
    def build(self, task: Task, encoder: Encoder | None = None) -> nn.Module:
        """The module that is trained, with initial weights from torch's generator.

        What is not trained of it requires no gradient. `encoder` is None where features come from elsewhere.

        Raises:
            ModelError: the encoder lacks what the method needs.
        """

    @abstractmethod
    def phases(self, silo: str | None = None) -> Sequence[Phase]:
        """What a batch of `silo` goes through, in order; None where nobody in particular trains.

        Raises:
            ConfigError: the plan says nothing about this silo that the method needs.
        """

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (B, C)."""

    def begin_round(self, model: nn.Module) -> None:
        """Note what the shared parameters of `model` were when they were received."""

    def server_state(self) -> dict[str, Any]:
        """What all silos must have alike beside the parameters; it stands in federation.lock."""
        return {}
