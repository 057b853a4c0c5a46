"""The data report as one HTML page with thumbnails, without scripts or anything remote. It never leaves the silo."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedclip_secure.data.image import load_image
from fedclip_secure.data.report import DataReport
from fedclip_secure.errors import FedClipError

EACH_CLASS = 6  # thumbnails
_SIDE = 112  # pixels


def render_page(
    report: DataReport, silo: str, by_class: Mapping[str, Sequence[str]], thumbnails: Mapping[str, str]
) -> str:
    """The page; `by_class` are the images that are shown of each class, `thumbnails` data URIs by path."""
    environment = Environment(
        loader=PackageLoader("fedclip_secure.data"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("data-report.html").render(
        report=report, silo=silo, by_class=by_class, thumbnails=thumbnails,
        shown={path for path, picture in thumbnails.items() if picture},
    )  # fmt: skip


def thumbnail(path: Path, window: tuple[int, int] | None) -> str:
    """A small picture as a data URI, as the encoder gets to see it; empty where the file cannot be read any more."""
    try:
        image = load_image(path, window)
    except FedClipError:
        return ""
    image.thumbnail((_SIDE, _SIDE))
    kept = io.BytesIO()
    image.save(kept, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(kept.getvalue()).decode('ascii')}"
