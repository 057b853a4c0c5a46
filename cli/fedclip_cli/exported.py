"""What both programs print of an export."""

from __future__ import annotations

from pathlib import Path

from fedclip_cli.console import out
from fedclip_secure.export.adapter_facts import KEPT_HOME, Facts


def print_export(facts: Facts, files: list[Path]) -> None:
    """Which files an export has written."""
    for file in files:
        out.print(file, markup=False)
    out.print(f"{facts.kind} adapter, after round {facts.after_round}; README.md says what it is and how to load it")
    if facts.kept_home:
        out.print(f"it was {KEPT_HOME}", markup=False)
