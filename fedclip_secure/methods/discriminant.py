"""One round of sums, and the classifier that Gaussian classes with the text as a prior make of them.

A record has x = norm(f) and φ = (x, norm(relu(R x)) / 2), (E,), E = D + D // 4; the signs R are constants. It adds
to three sums: 1 to its class's count n_c, φ to S_c, and φφᵀ to M. A further record, spread over the classes, has
their text for φ, and with it alone the rule below is zero-shot. With N = Σ n_c and d_c = T_c - Σ n_c T_c / N:

    μ_c = Σ S_c / N + ρ d_c        where a class is expected: ρ d_c is the best fit to the records' means
    m_c = (k μ_c + S_c) / (k + n_c)        where it lies; μ_c counts as k = 3 records
    W   = Σ_c Σ_{x of c} (φ - m_c)(φ - m_c)ᵀ        how far records lie from there, from n, S and M
    P   = ((N - 1) + ν v s) · (W + ν v I)⁻¹,   ν = 0.03, v: what a record adds to W's trace, at the start 1
    logits = φᵀ P m_c - m_cᵀ P m_c / 2

- It is the posterior of means and covariance (Gelman et al. 2013, section 3.6) around what zero-shot stands for:
  classes around T_c with the covariance I / s. Gaussian classes on CLIP's features: Wang et al. 2024
  (arXiv:2402.04087); they add zero-shot's logits to those of the records, which takes a weight to be tuned.
- Sums over silos are those over all records: which silo has which classes makes no difference (Fanì et al. 2024,
  arXiv:2406.01116, for ridge regression). What differs between silos counts for W as a difference within classes,
  and is played down by P, also at a site that never trained.
- The random features are RanPAC's (McDonnell et al. 2023, arXiv:2307.02251).
- Noise in M, of privacy or of rounding, shows in how far M is from symmetric, and it is as large in every sum. μ_c
  then counts for more records, and the eigenvalues of W that cannot be told from noise become their mean.

The sums are the gradient of a loss that is linear in them, whose norm is the same for every record: GRADIENT_NORM,
which as `max_grad_norm` cuts nothing. They count records where `lr` is the batch size (with privacy, the divisor),
`coordinate_clip` is no smaller than the records of a silo, and silos weigh alike: `weights: equal`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedclip_secure.config.method_needs import NEEDS
from fedclip_secure.data.dataset import Task
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.methods.base import Batch, Method, MethodSpec, Phase

_SHARED = ("classes.weight", "classes.bias", "moments.weight")
_RANDOM_SHARE = 4  # one random feature for so many of the encoder's
_RANDOM_NORM = 0.5  # of the random features of a record
_SQUARE = 1 + _RANDOM_NORM**2  # of the norm of φ
GRADIENT_NORM = (1 + _SQUARE + _SQUARE**2) ** 0.5  # of a record: 1.953
_TEXT_RECORDS = 3.0  # k
_RIDGE = 0.03  # ν
_START_STD = 1e-6  # of a coordinate, so that another run starts from another model
_TINY = 1e-12
_SIGNS = b"fedclip-secure/v1/discriminant"


class Sums(nn.Module):
    """n (C,) and S (C, E) in `classes`, M (E, E) in `moments`, for features of the width `dim`, D."""

    signs: Tensor

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        signs = _signs(dim // _RANDOM_SHARE, dim)
        self.register_buffer("signs", signs, persistent=False)
        width = dim + len(signs)
        self.classes = nn.Linear(width, classes)
        self.moments = nn.Linear(width, width, bias=False)

    def lift(self, image_features: Tensor) -> Tensor:
        """φ of `image_features` (B, D): (B, E).

        In float64, whatever they came in: M adds up a square of it, and later differences of large numbers are taken.
        """
        here = image_features.cpu() if image_features.device.type == "mps" else image_features  # MPS has no float64
        x = normalize(here.double(), dim=-1)
        random = normalize(torch.relu(x @ self.signs.to(x.device).to(x.dtype).T), dim=-1)
        return torch.cat([x, _RANDOM_NORM * random], dim=-1).to(image_features)

    def forward(self, lifted: Tensor, labels: Tensor) -> Tensor:
        """What has each record's count, φ and φφᵀ for its gradient, (B,), of φ (B, E)."""
        own: Tensor = self.classes(lifted).gather(1, labels[:, None])[:, 0]
        moved: Tensor = self.moments(lifted)
        return own + (lifted * moved).sum(dim=-1)


class Discriminant(Method):
    """The method; it has no options."""

    @property
    def spec(self) -> MethodSpec:
        """Everything travels, once: E² + C·E + C parameters."""
        return MethodSpec(
            inputs=frozenset({"image_features", "text_features"}),
            backprop="none",
            shared=_SHARED,
            private=(),
            per_record_loss=True,
            private_feeds_shared=False,
            one_sum=True,
            needs=NEEDS["discriminant"],
        )

    def build(self, task: Task, encoder: Encoder | None = None) -> nn.Module:  # noqa: ARG002 - features are all it takes
        """The sums over the record that has the text for its features, drawn off by next to nothing."""
        classes, dim = task.text_features.shape
        model = Sums(dim, classes)
        text = _padded(torch.from_numpy(task.text_features), model)
        with torch.no_grad():
            for value in model.parameters():
                value.normal_(std=_START_STD)
            model.classes.bias.add_(1 / classes)
            model.classes.weight.add_(text / classes)
            model.moments.weight.add_(text.T @ text / classes)
        return model

    def phases(self, silo: str | None = None) -> Sequence[Phase]:  # noqa: ARG002 - all silos alike
        """One step, which adds the records up."""
        return (Phase(_SHARED, _addition),)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of the rule, (B, C)."""
        sums = _own(model)
        # Float64 on the CPU: M is a difference of large numbers, and not every device has float64.
        text = _padded(batch.text_features, sums).cpu().double()
        weight, bias = _rule(_Noisy.of(sums), text, batch.logit_scale)
        lifted = sums.lift(batch.images)
        return lifted @ weight.to(lifted).T + bias.to(lifted)


@dataclass(frozen=True, slots=True, eq=False)
class _Noisy:
    """The sums, float64, and the `variance` of the noise in each of their coordinates."""

    counts: Tensor  # (C,), at least the text's part
    totals: Tensor  # (C, E)
    moments: Tensor  # (E, E), symmetric
    variance: float

    @classmethod
    def of(cls, sums: Sums) -> _Noisy:
        counts, totals, moments = (
            value.detach().cpu().double() for value in (sums.classes.bias, sums.classes.weight, sums.moments.weight)
        )
        width = len(moments)
        variance = float((moments - moments.T).square().sum()) / (2 * width * (width - 1))
        return cls(counts.clamp(min=1 / len(counts)), totals, (moments + moments.T) / 2, variance)


def _rule(sums: _Noisy, text: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """P m_c (C, E) and -m_cᵀ P m_c / 2 (C,)."""
    records = float(sums.counts.sum())
    spread = _spread(sums)
    means = _means(sums, text, spread)
    cross = means.T @ sums.totals
    within = sums.moments - cross - cross.T + (sums.counts[:, None] * means).T @ means
    values, vectors = torch.linalg.eigh(within)
    values = _told_from_noise(values, sums.variance)
    prior = _RIDGE * spread
    precision = (max(records - 1, 0.0) + prior * scale) / (values + prior)
    weight = (means @ vectors * precision) @ vectors.T
    return weight, -(means * weight).sum(dim=1) / 2


def _told_from_noise(values: Tensor, variance: float) -> Tensor:
    """Eigenvalues (E,) with those that noise makes by itself replaced by their mean, or 0.

    The symmetric part of E x E coordinates of this variance has eigenvalues up to sqrt(2 E variance) (Wigner 1955).
    """
    noise = values < (2 * len(values) * variance) ** 0.5
    mean = values[noise].sum() / noise.sum().clamp(min=1)
    return torch.where(noise, mean.clamp(min=0), values)


def _spread(sums: _Noisy) -> float:
    """v: the mean squared distance of a record to the mean of its class, no less than one record of 1 would make it."""
    noise = sums.variance * sums.totals.shape[1]
    squares = sums.totals.square().sum(dim=1) - noise
    found = float(sums.moments.trace() - (squares / sums.counts).sum())
    return max(found, 1.0) / float(sums.counts.sum())


def _means(sums: _Noisy, text: Tensor, spread: float) -> Tensor:
    """m_c, (C, E). Noise makes a class's own mean worth less: by its variance over that of a mean of n_c records."""
    counts = sums.counts[:, None]
    records = counts.sum()
    centre = sums.totals.sum(dim=0) / records
    offsets = text - (counts * text).sum(dim=0) / records
    fit = ((sums.totals - counts * centre) * offsets).sum()
    slope = fit / (counts * offsets.square()).sum().clamp(min=_TINY)  # 0 where all classes have the same text
    expected = centre + slope * offsets
    worth = _TEXT_RECORDS * (1 + sums.variance * sums.totals.shape[1] / (counts * spread))
    return (worth * expected + sums.totals) / (worth + counts)


def _addition(model: nn.Module, batch: Batch) -> Tensor:
    sums = _own(model)
    added: Tensor = sums(sums.lift(batch.images), batch.labels)
    return -added


def _own(model: nn.Module) -> Sums:
    assert isinstance(model, Sums)  # noqa: S101 - made by `build`
    return model


def _padded(text: Tensor, sums: Sums) -> Tensor:
    """Text features (C, D) with zeros for the random features, (C, E)."""
    return nn.functional.pad(text, (0, len(sums.signs)))


def _signs(rows: int, columns: int) -> Tensor:
    """R: (rows, columns) of +1 and -1, the same everywhere: bits of SHAKE-256 (FIPS 202) over a constant."""
    stream = hashlib.shake_256(_SIGNS).digest((rows * columns + 7) // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8))[: rows * columns]
    return torch.from_numpy(2 * bits.astype(np.float32) - 1).reshape(rows, columns)
