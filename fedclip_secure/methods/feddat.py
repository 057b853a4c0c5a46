"""FedDAT: two adapters that teach each other (Chen et al. 2024, arXiv:2308.12305).

An adapter is `h + Up(ReLU(Down h))`. A0 stays at the silo, A1 travels, and A2 is A1 as it was received. z0 and z1 are
the logits with A0 and with A1 alone; those of the teacher, z_all, come of the mean of what A0 and A2 give at each
place. On every batch A1 takes a step on `½[task(z1) + KD(z1←z_all)]` and then A0 one on `½[task(z0) + KD(z0←z1)]`,
where `KD(s←t) = 9·KL(softmax(t/3) ‖ softmax(s/3))`; no gradient reaches a target. What predicts is A1 alone.

- The teacher averages adapters, not logits: so does the authors' program (github.com/HaokunChen245/FedDAT), and in a
  tower it is one pass in place of two.
- z1 in A0's step is that of A1 after its own step; the authors keep the one from before. With privacy A0's step has a
  batch of its own, for which there is no z1 from before.
- Up starts at zero, so that training sets out from zero-shot; the authors' starts as small random numbers.
- A0 decides gradients of A1, so with privacy both steps get noise, and each is charged.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize

from fedclip_secure.data.dataset import Task
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.features.towers import VisualTower, tunable_copy
from fedclip_secure.methods.base import Batch, Method, MethodSpec, Phase
from fedclip_secure.methods.fedtune import needed
from fedclip_secure.methods.tuned_visual import Bottleneck

_SHARED, _PRIVATE = ("shared.*",), ("local.*",)
_TEMPERATURE = 3.0


class FedDat(Method):
    """One adapter on the feature, or one after each block of the visual tower from `first_block` on."""

    place: Literal["features", "blocks"] = "features"
    width: int = Field(default=48, ge=1, le=4096)  # of an adapter's middle
    first_block: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _goes_with_place(self) -> FedDat:
        if self.place == "features" and self.first_block:
            raise ValueError("`first_block` goes with `place: blocks` alone; leave it out")
        return self

    @property
    def spec(self) -> MethodSpec:
        """A1 travels; A0 stays, and feeds it."""
        taken = "image_features" if self.place == "features" else "tokens"
        return MethodSpec(
            inputs=frozenset({taken, "text_features"}),
            backprop="none" if self.place == "features" else "visual",
            shared=_SHARED,
            private=_PRIVATE,
            per_record_loss=True,
            private_feeds_shared=True,
            first_block=self.first_block,
        )

    def build(self, task: Task, encoder: Encoder | None = None) -> nn.Module:
        """The adapters, over a tower that takes no gradients where they lie in one."""
        if self.place == "features":
            return DualAdapters(task.text_features.shape[1], self.width)
        there = needed(encoder, "feddat on blocks")
        there.shape_of(self.spec.stage)  # refuses a first_block past the last
        tower = tunable_copy(there.visual_tower(), [])
        return DualAdapters(tower.width, self.width, tower, self.first_block)

    def phases(self, silo: str | None = None) -> Sequence[Phase]:  # noqa: ARG002 - all silos alike
        """A step of A1, then one of A0."""
        return (Phase(_SHARED, _shared_loss), Phase(_PRIVATE, _local_loss))

    def begin_round(self, model: nn.Module) -> None:
        """A2 becomes A1."""
        model.get_submodule("received").load_state_dict(model.get_submodule("shared").state_dict())

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """`s·norm(f)·Tᵀ` with A1, (B, C)."""
        logits: Tensor = model(batch, "shared")
        return logits


class DualAdapters(nn.Module):
    """A0 `local`, A1 `shared` and A2 `received`: each a list of adapters of one `width`, `inside` wide in the middle.

    They lie after the blocks of `tower` from `first` on; without a tower there is one, on the feature.
    """

    def __init__(self, width: int, inside: int, tower: VisualTower | None = None, first: int = 0) -> None:
        super().__init__()
        self.tower, self._first = tower, first
        places = 1 if tower is None else len(tower.blocks) - first
        self.shared = nn.ModuleList(Bottleneck(width, inside) for _ in range(places))
        self.local = nn.ModuleList(Bottleneck(width, inside) for _ in range(places))
        self.received = copy.deepcopy(self.shared).requires_grad_(False)

    def forward(self, batch: Batch, *kinds: str) -> Tensor:
        """`s·norm(f)·Tᵀ`, (B, C), with the adapters `kinds`, or the mean of what they give at each place."""
        features = self._features(batch.images, kinds)
        return batch.logit_scale * normalize(features, dim=-1) @ batch.text_features.T

    def _features(self, images: Tensor, kinds: Sequence[str]) -> Tensor:
        if self.tower is None:
            return self._adapted(images, kinds, 0)
        hidden = self.tower.norm(images) if self._first == 0 else images
        for number, block in enumerate(self.tower.blocks[self._first :]):
            hidden = self._adapted(block(hidden), kinds, number)
        return self.tower.pool(hidden)

    def _adapted(self, hidden: Tensor, kinds: Sequence[str], number: int) -> Tensor:
        given = [self.get_submodule(f"{kind}.{number}")(hidden) for kind in kinds]
        return torch.stack(given).mean(dim=0)


def _shared_loss(model: nn.Module, batch: Batch) -> Tensor:
    return _taught(model, batch, "shared", ("local", "received"))


def _local_loss(model: nn.Module, batch: Batch) -> Tensor:
    return _taught(model, batch, "local", ("shared",))


def _taught(model: nn.Module, batch: Batch, student: str, teachers: Sequence[str]) -> Tensor:
    """`½[task(z) + KD(z←t)]` of each record, (B,), z being the logits with `student` and t those with `teachers`."""
    with torch.no_grad():
        target = model(batch, *teachers)
    logits = model(batch, student)
    return (cross_entropy(logits, batch.labels, reduction="none") + _distillation(logits, target)) / 2


def _distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """`9·KL(softmax(teacher/3) ‖ softmax(student/3))` of each row, (B,)."""
    ours, theirs = (log_softmax(logits / _TEMPERATURE, dim=1) for logits in (student, teacher))
    return _TEMPERATURE**2 * kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)
