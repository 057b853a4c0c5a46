"""A report on the disk: the signed JSON, and the page that is made of it."""

from __future__ import annotations

from pathlib import Path

from fedclip_secure.files import make_folder, write_atomically
from fedclip_secure.privacy.page.page import render_page


def write_report(folder: Path, data: bytes) -> tuple[Path, Path]:
    """Write `report.json` and the page that is made of it; their paths.

    Raises:
        DataError: the disk refuses. TrustError: the report does not pass, and neither is written.
    """
    rendered = render_page(data)
    make_folder(folder, "choose another with --out")
    signed, page = folder / "report.json", folder / "report.html"
    write_atomically(signed, data)
    write_atomically(page, rendered.encode())
    return signed, page
