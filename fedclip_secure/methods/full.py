"""Federated averaging of the whole encoder, plain (McMahan et al. 2017) or with a proximal term.

FedProx (Li et al. 2020, arXiv:1812.06127) adds μ/2·‖w - w_t‖² to the loss, w_t being the received parameters. It is
the same in every record's loss, so each of them is still a record's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedclip_secure.config.method_needs import NEEDS
from fedclip_secure.data.dataset import Task
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.features.towers import tunable_copy
from fedclip_secure.methods.base import Batch, Method, MethodSpec, Phase
from fedclip_secure.methods.fedtune import Classifier, drawn_off, needed
from fedclip_secure.methods.losses import LOSSES

_ALL = ("*",)
_LARGEST_LOG_SCALE = math.log(1000)  # CLIP's own training ends at 100, SigLIP's at 118


class FullTuning(Method):
    """Every parameter of the encoder, both towers and the temperature; pixels go through all of it in every step."""

    losses = ("cross_entropy", "inbatch")
    has_head = True

    mu: float = Field(default=0.01, ge=0)  # of the proximal term

    @property
    def spec(self) -> MethodSpec:
        """The in-batch loss couples records; everything else is the same."""
        return MethodSpec(
            inputs=frozenset({"pixels"}),
            backprop="both",
            shared=_ALL,
            private=(),
            per_record_loss=self.loss == "cross_entropy",
            private_feeds_shared=False,
            needs=NEEDS["fedavg_full"],
        )

    def build(self, task: Task, encoder: Encoder | None = None) -> nn.Module:
        """The encoder, or, where it reads no text, its visual tower with a head."""
        there = needed(encoder, "this method")
        whole = there.whole()
        copied = drawn_off(tunable_copy(whole, [name for name, _ in whole.named_parameters()]))
        if not len(task.text_features):
            return Whole(Classifier(copied, task))
        prompts = [template.replace("{}", phrase) for phrase in task.phrases for template in task.templates]
        return Whole(WholeClip(copied, there.tokens(prompts), len(task.classes)))

    def begin_round(self, model: nn.Module) -> None:
        """Note the received parameters, from which the proximal term keeps the others."""
        assert isinstance(model, Whole)  # noqa: S101 - as built
        model.received = [value.detach().clone() for value in model.parameters()] if self.mu else []

    def phases(self, silo: str | None = None) -> Sequence[Phase]:  # noqa: ARG002 - all silos alike
        """One step of everything."""
        loss = LOSSES[self.loss]
        return (Phase(_ALL, lambda model, batch: loss(model(batch), batch.labels) + self._proximal(model)),)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (B, C)."""
        logits: Tensor = model(batch)
        return logits

    def _proximal(self, model: nn.Module) -> Tensor:
        received = getattr(model, "received", [])
        squares = [(value - start).square().sum() for value, start in zip(model.parameters(), received, strict=False)]
        return torch.stack(squares).sum() * (self.mu / 2) if squares else torch.zeros(())


class Whole(nn.Module):
    """`inner`, always in evaluation mode: the statistics of a BatchNorm are nobody's parameters, and stay."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.received: list[Tensor] = []

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C)."""
        logits: Tensor = self.inner(batch)
        return logits

    def train(self, mode: bool = True) -> Whole:  # noqa: ARG002 - torch's signature
        """Stay in evaluation mode."""
        super().train(False)
        return self


class WholeClip(nn.Module):
    """CLIP's logits over the mean text features of the classes' prompts, `tokens` (C·templates, L)."""

    tokens: Tensor

    def __init__(self, clip: nn.Module, tokens: Tensor, classes: int) -> None:
        super().__init__()
        self.clip: Any = clip
        self._classes = classes
        self.register_buffer("tokens", tokens, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """Of pixels (B, 3, S, S): (B, C)."""
        images = normalize(self.clip.encode_image(batch.images), dim=-1)
        texts = normalize(self.clip.encode_text(self.tokens), dim=-1)
        text = normalize(texts.reshape(self._classes, -1, texts.shape[-1]).mean(dim=1), dim=-1)
        scale = self.clip.logit_scale.clamp(max=_LARGEST_LOG_SCALE).exp()
        logits: Tensor = scale * images @ text.T
        return logits
