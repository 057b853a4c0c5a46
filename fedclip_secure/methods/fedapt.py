"""FedAPT: one meta prompt that keys turn into a prompt for each domain (Su et al. 2024, arXiv:2211.07864).

The plan names K domains and the silos in each. Every domain has a key in [0,1)^(n×W), drawn once and never trained: n
tokens, W the text tower's width. All silos train one meta prompt P (C, n, W) and one network Q (K, D). A silo of
domain k has the text features T of the prompts [start; P + P∘key_k; class; end] and the loss
`CE(s·norm(f)·Tᵀ, y) + CE(Q f, k)`.

An image is classified with the key Σ_k w_k key_k, where w = softmax(u / 0.01) and u is Q f standardised over domains
(the deviation has K - 1 below, as in the authors' program, github.com/leondada/FedAPT). With one domain w is 1; where
Q f is the same for all domains u is zero, and w is 1/K.

- `fast` encodes K lists of prompts, and takes for each image the one of its largest w; without it the prompts of each
  image are encoded, C for every image. The two differ only where w is not one-hot, which takes two domains whose u are
  within some hundredths: then the exact key lies between two keys, and fast takes the one ahead.
- The f that Q reads is 10·norm(f), not the raw one: 10 is about the length of ViT-B/32's features, on which the
  authors chose their learning rate, and w knows no length anyway. A step of SGD moves Q f by lr·‖f‖², so with an
  encoder whose features are twenty times as long Q would swing from one domain to the next.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fedclip_secure.config.fields import Name
from fedclip_secure.data.dataset import Task
from fedclip_secure.errors import ConfigError, ModelError
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.features.towers import TextTower, tunable_copy
from fedclip_secure.methods.base import Batch, Method, MethodSpec, Phase
from fedclip_secure.methods.fedtune import needed
from fedclip_secure.methods.tuned_text import context_tower
from fedclip_secure.names import MAX_SILOS

_SHARED = ("prompt", "network.weight")
_PROMPT_STD = 0.02
_TEMPERATURE = 0.01
_LENGTH = 10.0  # of the features that Q reads
_WIDEST = 2048  # keys are drawn so wide and cut to the tower's width: no encoder decides what they are
Silos = Annotated[list[Name], Field(min_length=1)]


class FedApt(Method):
    """The method. Domains count in the order of their names, since a plan's mapping has none."""

    domains: dict[Name, Silos] = Field(min_length=1, max_length=MAX_SILOS)
    length: int = Field(default=16, ge=1, le=256)  # n, tokens
    fast: bool = True
    seed: int = Field(default=0, ge=0, le=2**31 - 1)  # of the keys, which are public

    @field_validator("domains")
    @classmethod
    def _one_each(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        counts = Counter(silo for silos in value.values() for silo in silos)
        twice = [silo for silo, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"{', '.join(twice)} is listed more than once; a silo has one domain")
        return value

    @property
    def spec(self) -> MethodSpec:
        """P and Q travel: C·n·W + K·D parameters."""
        return MethodSpec(
            inputs=frozenset({"image_features"}),
            backprop="text",
            shared=_SHARED,
            private=(),
            per_record_loss=True,
            private_feeds_shared=False,
        )

    def build(self, task: Task, encoder: Encoder | None = None) -> nn.Module:
        """P ~ N(0, 0.02²), Q as torch starts a layer, and the keys; the class's phrase alone follows the prompt."""
        there = needed(encoder, "fedapt")
        tower = tunable_copy(context_tower(task, there, self.length), [])
        if tower.width > _WIDEST:
            raise ModelError(
                f"the text tower is {tower.width} wide, and fedapt goes to {_WIDEST}; choose another model"
            )
        keys = torch.from_numpy(self._keys()[:, :, : tower.width].copy())
        return KeyedPrompts(tower, keys, task.text_features.shape[1])

    def phases(self, silo: str | None = None) -> Sequence[Phase]:
        """One step for the silo's domain; for nobody in particular, as in the first one."""
        domain = 0 if silo is None else self._domain_of(silo)
        return (Phase(_SHARED, partial(_loss, domain)),)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """`s·norm(f)·Tᵀ` with the text features that each image's domains make, (B, C)."""
        weights = _weights(_domain_scores(model, batch.images))
        logits = _by_largest if self.fast else _by_mixture
        return batch.logit_scale * logits(model, normalize(batch.images, dim=-1), weights)

    def server_state(self) -> dict[str, Any]:
        """By what a silo finds that its numpy draws other keys than the coordinator's."""
        data = self._keys().astype("<f4").tobytes()
        return {"domains": sorted(self.domains), "keys_sha256": hashlib.sha256(data).hexdigest()}

    def _keys(self) -> npt.NDArray[np.float32]:
        """(K, n, _WIDEST), uniform in [0, 1)."""
        generator = np.random.Generator(np.random.PCG64(self.seed))
        return generator.random((len(self.domains), self.length, _WIDEST), dtype=np.float32)

    def _domain_of(self, silo: str) -> int:
        for number, name in enumerate(sorted(self.domains)):
            if silo in self.domains[name]:
                return number
        raise ConfigError(
            f"federation.yaml: method.domains: the silo {silo} is in none; the coordinator adds it to its domain "
            "and runs `prepare` again"
        )


class KeyedPrompts(nn.Module):
    """P, Q and the `keys` (K, n, W): text features (C, D) of norm 1 for a key."""

    keys: Tensor

    def __init__(self, tower: TextTower, keys: Tensor, dim: int) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("keys", keys, persistent=False)
        self.prompt = nn.Parameter(torch.randn(len(tower.embeddings), *keys.shape[1:]) * _PROMPT_STD)
        self.network = nn.Linear(dim, len(keys), bias=False)

    def forward(self, key: Tensor) -> Tensor:
        """Of the prompts [start; P + P∘key; class; end], `key` (n, W)."""
        plain = self.tower.embeddings
        prompts = torch.cat([plain[:, :1], self.prompt + self.prompt * key, plain[:, 1 + len(key) :]], dim=1)
        return normalize(self.tower(prompts), dim=-1)


def _loss(domain: int, model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy over the classes plus that over the domains, of each record, (B,)."""
    text = model(model.get_buffer("keys")[domain])
    classes = batch.logit_scale * normalize(batch.images, dim=-1) @ text.T
    domains, own = _domain_scores(model, batch.images), torch.full_like(batch.labels, domain)
    return cross_entropy(classes, batch.labels, reduction="none") + cross_entropy(domains, own, reduction="none")


def _domain_scores(model: nn.Module, images: Tensor) -> Tensor:
    """Q f, (B, K)."""
    scores: Tensor = model.get_submodule("network")(_LENGTH * normalize(images, dim=-1))
    return scores


def _weights(scores: Tensor) -> Tensor:
    """What each domain weighs for each image, (B, K), by `scores` (B, K)."""
    centred = scores - scores.mean(dim=1, keepdim=True)
    standard = math.sqrt(scores.shape[1] - 1) * normalize(centred, dim=1)  # which leaves zeros as they are
    return torch.softmax(standard / _TEMPERATURE, dim=1)


def _by_largest(model: nn.Module, images: Tensor, weights: Tensor) -> Tensor:
    """Cosines (B, C) with the text features of each image's heaviest domain."""
    texts = torch.stack([model(key) for key in model.get_buffer("keys")])
    cosines = torch.einsum("bd,kcd->bkc", images, texts)
    return cosines[torch.arange(len(images), device=images.device), weights.argmax(dim=1)]


def _by_mixture(model: nn.Module, images: Tensor, weights: Tensor) -> Tensor:
    """Cosines (B, C) with the text features of each image's own key."""
    keys = torch.einsum("bk,knw->bnw", weights, model.get_buffer("keys"))
    rows = [model(key) @ image for key, image in zip(keys, images, strict=True)]
    return torch.stack(rows)
