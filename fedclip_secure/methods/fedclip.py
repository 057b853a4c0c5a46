"""FedCLIP: an attention adapter on CLIP's image features (Lu et al. 2023, arXiv:2302.13485)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fedclip_secure.data.dataset import Task
from fedclip_secure.methods.base import Batch, MethodSpec, Phase

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


@dataclass(frozen=True, slots=True)
class FedClip:
    """The method with one of its two losses."""

    loss: Literal["cross_entropy", "inbatch"]

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
        )

    def build(self, task: Task) -> nn.Module:
        """The adapter for features as wide as the task's."""
        return AttentionAdapter(task.text_features.shape[1])

    def phases(self) -> Sequence[Phase]:
        """One step of the adapter."""
        return (Phase(_SHARED, {"cross_entropy": _cross_entropy, "inbatch": _inbatch}[self.loss]),)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """`s · z · Tᵀ`, (B, C)."""
        return _logits(model, batch)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    adapted: Tensor = model(batch.image_features)
    return batch.logit_scale * adapted @ batch.text_features.T


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(_logits(model, batch), batch.labels, reduction="none")


def _inbatch(model: nn.Module, batch: Batch) -> Tensor:
    """The paper's code: CLIP's symmetric loss over the batch's own texts, S = s·Z·T[y]ᵀ.

    Row i is half of image i's cross-entropy over the texts plus half of text i's over the images, so
    the mean of the rows is the mean of the two losses. Two records of one class have the same text,
    and each counts the other's as wrong; that is the paper's loss.
    """
    similarity = batch.logit_scale * model(batch.image_features) @ batch.text_features[batch.labels].T
    diagonal = torch.arange(len(similarity), device=similarity.device)
    images = cross_entropy(similarity, diagonal, reduction="none")
    texts = cross_entropy(similarity.T, diagonal, reduction="none")
    return (images + texts) / 2
