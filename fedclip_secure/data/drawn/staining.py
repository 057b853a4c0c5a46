"""How a laboratory's staining and scanner turn a drawing into an image."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from fedclip_secure.data.drawn.drawings import SIZE, Floats, Random

Triple = tuple[float, float, float]  # red, green, blue

_AXIS = np.linspace(-1, 1, SIZE)
_X, _Y = np.meshgrid(_AXIS, _AXIS)
_CLOUD_CELLS = 5  # along one side of the coarse grid behind the texture


@dataclass(frozen=True, slots=True)
class Look:
    """One laboratory's staining and scanner."""

    background: Triple  # light through an empty slide, 0..1
    body: Triple  # absorbance of bodies at density 1
    detail: Triple  # absorbance of nuclei, walls and debris at density 1
    vignette: float = 0.0  # share of the light that the corners lack
    tilt: tuple[float, float] = (0.0, 0.0)  # growth of the light along x and along y, from the middle to the edge
    texture: float = 0.0  # amplitude of slow clouds in the light
    blur: float = 0.0  # Gaussian radius in pixels
    stripes: tuple[float, float] = (0.0, 1.0)  # of a line scanner: amplitude, and period in pixels
    white_balance: Triple = (1.0, 1.0, 1.0)
    gamma: float = 1.0
    contrast: float = 1.0  # around middle grey
    noise: float = 0.0  # standard deviation, where white is 1
    quality: int = 95  # of the JPEG that the scanner keeps


def render(density: Floats, look: Look, random: Random) -> Image.Image:
    """The image of a drawing (2, SIZE, SIZE) under `look`; `random` makes its texture and its noise."""
    light = _stained(density, look) * _illumination(look, random)[..., None]
    if look.blur:
        light = _floats(_image(light).filter(ImageFilter.GaussianBlur(look.blur)))
    return _compressed(_image(_scanned(light, look, random)), look.quality)


def random_look(random: Random) -> Look:
    """One of the wide family of looks that fedclip-tiny is trained on: no stripes, and little blur."""
    return Look(
        background=_triple(random.uniform(0.72, 1.0, 3)),
        body=_dye(random),
        detail=_dye(random),
        vignette=float(random.choice((0.0, random.uniform(0, 0.4)))),
        tilt=(random.uniform(-0.12, 0.12), random.uniform(-0.12, 0.12)),
        texture=random.uniform(0, 0.12),
        blur=float(random.choice((0.0, random.uniform(0.2, 1.1)))),
        white_balance=_triple(random.uniform(0.88, 1.12, 3)),
        gamma=float(np.exp(random.uniform(-0.4, 0.4))),
        contrast=random.uniform(0.65, 1.2),
        noise=random.uniform(0, 0.06),
        quality=int(random.integers(40, 96)),
    )


def _dye(random: Random) -> Triple:
    return _triple(0.15 + random.uniform(1.2, 3.2) * random.dirichlet((1.2, 1.2, 1.2)))


def _triple(values: npt.NDArray[np.float64]) -> Triple:
    red, green, blue = values.tolist()
    return red, green, blue


def _stained(density: Floats, look: Look) -> Floats:
    """Light behind the slide, (SIZE, SIZE, 3), by Beer and Lambert's law."""
    body, detail = density[..., None]
    absorbance = body * np.array(look.body) + detail * np.array(look.detail)
    light: Floats = np.array(look.background) * np.exp(-absorbance)
    return light


def _illumination(look: Look, random: Random) -> Floats:
    """What part of the light reaches each pixel, (SIZE, SIZE)."""
    light = 1 - look.vignette / 2 * (_X**2 + _Y**2)
    light += look.tilt[0] * _X + look.tilt[1] * _Y
    clouds = Image.fromarray(random.standard_normal((_CLOUD_CELLS, _CLOUD_CELLS), dtype=np.float32))
    return light + look.texture * np.asarray(clouds.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _scanned(light: Floats, look: Look, random: Random) -> Floats:
    amplitude, period = look.stripes
    rows = np.arange(SIZE) % period < period / 2
    gain = 1 + amplitude * np.where(rows, 1, -1)
    exposed: Floats = np.clip(light * gain[:, None, None] * np.array(look.white_balance), 0, 1) ** look.gamma
    noise = look.noise * random.standard_normal(light.shape)
    return (exposed - 0.5) * look.contrast + 0.5 + noise


def _image(light: Floats) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(light * 255), 0, 255).astype(np.uint8))


def _floats(image: Image.Image) -> Floats:
    return np.asarray(image) / 255


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    kept = io.BytesIO()
    image.save(kept, "JPEG", quality=quality)
    return Image.open(kept).convert("RGB")
