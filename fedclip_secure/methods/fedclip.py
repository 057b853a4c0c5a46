"""FedCLIP: an attention adapter on CLIP's image features (Lu et al. 2023, arXiv:2302.13485)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedclip_secure.config.method_needs import NEEDS
from fedclip_secure.data.dataset import Task
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.methods.base import Batch, Method, MethodSpec, Phase
from fedclip_secure.methods.losses import LOSSES

_SHARED = ("hidden.weight", "hidden.bias", "gate.weight", "gate.bias")


class AttentionAdapter(nn.Module):
    """`a = softmax(W2·tanh(W1 f + b1) + b2)`, `z = norm(a ∘ f)`: (B, D) -> (B, D) of norm 1.

    At the start `a` is close to uniform, and z to norm(f): training sets out from zero-shot.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, dim)  # W1, b1
        self.gate = nn.Linear(dim, dim)  # W2, b2

    def forward(self, image_features: Tensor) -> Tensor:
        """Weigh the coordinates of `image_features` (B, D) and normalise."""
        attention = torch.softmax(self.gate(torch.tanh(self.hidden(image_features))), dim=-1)
        return normalize(attention * image_features, dim=-1)


class FedClip(Method):
    """The method with one of its two losses."""

    losses = ("cross_entropy", "inbatch")

    @property
    def spec(self) -> MethodSpec:
        """The in-batch loss couples records; everything else is the same."""
        return MethodSpec(
            inputs=frozenset({"image_features", "text_features"}),
            backprop="none",
            shared=_SHARED,
            private=(),
            per_record_loss=self.loss == "cross_entropy",
            private_feeds_shared=False,
            needs=NEEDS["fedclip"],
        )

    def build(self, task: Task, encoder: Encoder | None = None) -> nn.Module:  # noqa: ARG002 - features are all it takes
        """The adapter for features as wide as the task's."""
        return AttentionAdapter(task.text_features.shape[1])

    def phases(self, silo: str | None = None) -> Sequence[Phase]:  # noqa: ARG002 - all silos alike
        """One step of the adapter."""
        loss = LOSSES[self.loss]
        return (Phase(_SHARED, lambda model, batch: loss(_logits(model, batch), batch.labels)),)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """`s · z · Tᵀ`, (B, C)."""
        return _logits(model, batch)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    adapted: Tensor = model(batch.images)
    return batch.logit_scale * adapted @ batch.text_features.T
