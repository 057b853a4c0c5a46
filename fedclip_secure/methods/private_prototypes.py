"""Class prototypes from one noisy sum: the strong cheap baseline under differential privacy.

Each record adds norm(f) to the row of its class, a vector of norm 1 (zero stays zero), and nothing counts
records. That is one step of plain SGD from W on the loss `-norm(f)·W[y]`, whose gradient for W is just this
vector: so the engine that trains every method privately clips it, per record or per patient, adds noise and
charges one Gaussian event, with `sample_rate: 1`. W (C, D) starts as the text features T, and `lr` and
`update_divisor` say how many records weigh as much as the text. Logits are `s · norm(W) · norm(f)`: the nearest
class mean of Snell et al. 2017 (arXiv:1703.05175), with the text as one more example.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from fedclip_secure.config.method_needs import NEEDS
from fedclip_secure.data.dataset import Task
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.methods.base import Batch, Method, MethodSpec, Phase

_SHARED = ("weight",)
_START_STD = 1e-6  # of a coordinate; those of T are about 1/sqrt(D), 0.04 at D = 512


class PrivatePrototypes(Method):
    """The method; `loss` is the plan's default and stands for none other."""

    @property
    def spec(self) -> MethodSpec:
        """Everything travels: C·D parameters, once."""
        return MethodSpec(
            inputs=frozenset({"image_features", "text_features"}),
            backprop="none",
            shared=_SHARED,
            private=(),
            per_record_loss=True,
            private_feeds_shared=False,
            one_sum=True,
            needs=NEEDS["private_prototypes"],
        )

    def build(self, task: Task, encoder: Encoder | None = None) -> nn.Module:  # noqa: ARG002 - features are all it takes
        """W = T, drawn off by so little that only the digest shows it: another run starts from another model."""
        classes, dim = task.text_features.shape
        layer = nn.Linear(dim, classes, bias=False)
        with torch.no_grad():
            layer.weight.normal_(std=_START_STD).add_(torch.from_numpy(task.text_features))
        return layer

    def phases(self, silo: str | None = None) -> Sequence[Phase]:  # noqa: ARG002 - all silos alike
        """One step, which adds the records up."""
        return (Phase(_SHARED, _agreement),)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """`s · norm(W) · norm(f)`, (B, C)."""
        weight = model.get_parameter("weight")
        return batch.logit_scale * linear(normalize(batch.images, dim=-1), normalize(weight, dim=-1))


def _agreement(model: nn.Module, batch: Batch) -> Tensor:
    scores: Tensor = model(normalize(batch.images, dim=-1))
    return -scores.gather(1, batch.labels[:, None])[:, 0]
