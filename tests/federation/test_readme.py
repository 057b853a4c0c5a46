"""The README's walk-through, typed exactly as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from fedclip_secure.data.embeddings import read_embeddings, read_text_features
from tests.federation.processes import ENVIRONMENT, ROOT, free_port
from tests.waiting import BOUND


def commands() -> str:
    """The `sh` blocks of the README, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    return "".join(blocks)


def test_the_feature_files_of_the_readme_are_what_the_program_reads(tmp_path: Path) -> None:
    snippet = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippet) == 1
    subprocess.run([sys.executable, "-c", snippet[0]], cwd=tmp_path, check=True, timeout=BOUND)
    classes = ("pneumonia", "normal")  # the plan's order need not be the file's
    assert len(read_embeddings(tmp_path / "features.safetensors", classes, 1024)) == 500
    assert read_text_features(tmp_path / "prompts.safetensors", classes, 1024)[1] == 100.0


def test_the_walk_through_of_the_readme_works_as_written(tmp_path: Path, pacs_mini: Path) -> None:
    port = str(free_port())
    for name in ("tools", "silo_configs"):
        (tmp_path / name).mkdir()
        for file in (ROOT / name).iterdir():
            # The port is the one thing that a machine may have taken.
            (tmp_path / name / file.name).write_text(file.read_text().replace("8443", port))
    script = "set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n" + commands().replace("8443", port)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**ENVIRONMENT, "IMAGES": str(pacs_mini)},
        text=True,
        capture_output=True,
        timeout=BOUND,
        check=False,
    )
    logs = "\n".join(f"== {log.name}\n{log.read_text()}" for log in (tmp_path / "walk").glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    assert "pacs: finished" in done.stdout
    assert "accuracy on the test split" in done.stdout
    assert re.search(r"art took part in [1-5] of 5 round\(s\)", done.stdout)  # it may be slow for the first
    assert "averaged art, cartoon, photo;" in (tmp_path / "walk" / "serve.log").read_text()
