"""The page of methods: its table is the registry's, its plans are taken, and its example is a method."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from fedclip_secure.config.fields import check
from fedclip_secure.config.plan import MethodPlan
from fedclip_secure.config.yaml12 import read_yaml
from fedclip_secure.data.dataset import Task
from fedclip_secure.methods.registry import METHODS, find_method
from fedclip_secure.training.shared_parameters import read_shared
from tests.docs.pages import blocks, spans
from tests.federation.processes import ENVIRONMENT, ROOT

PAGE = ROOT / "docs" / "methods.md"
NEEDED = {"fedapt": {"domains": {"drawn": ["oak"]}}}  # what a method cannot do without
_REGISTRY = "fedclip_secure/methods/registry.py"


def rows() -> list[list[str]]:
    """The cells of the table of all methods."""
    table = PAGE.read_text().split("## All methods")[1].split("\n## ")[0]
    return [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]


def test_the_table_has_every_method_and_no_other() -> None:
    named = {name for row in rows() for name in spans(row[0]) if ":" not in name or name.startswith("fedtune:")}
    assert named == set(METHODS)


def test_the_table_gives_every_option_with_its_default() -> None:
    told: dict[str, set[str]] = {}
    for row in rows():
        for name in set(spans(row[0])) & set(METHODS):
            told.setdefault(name, set()).update(spans(row[4]))
    for name, entry in METHODS.items():
        here = {span.partition(":")[0] for span in told[name]}
        method = find_method(MethodPlan.model_validate({"name": name, **NEEDED.get(name, {})}))
        for option, value in method.model_dump().items():
            if option in entry.fixed or _of_another_arm(name, option):
                continue
            if option == "loss":
                assert ("loss" in here) == (len(type(method).losses) > 1), name
                continue
            written = str(value).lower() if isinstance(value, bool) else value
            assert option in here, f"{name}: {option}"
            assert f"{option}: {written}" in told[name] or option in NEEDED.get(name, {}), f"{name}: {option}"


def test_the_table_counts_the_parameters_of_methods_on_features() -> None:
    task = Task(tuple("abcdefg"), np.eye(7, 512, dtype=np.float32), 100.0)
    counted = {spans(row[0])[0]: row[3].split()[0].rstrip(",") for row in rows() if row[2].strip() == "feature"}
    for name in ("fedclip", "linear_probe", "private_prototypes", "discriminant", "fedtune:head", "feddat"):
        method = find_method(MethodPlan(name=name))
        assert counted[name] == f"{read_shared(method.build(task), method.spec).layout.size:,}", name


def test_every_plan_of_the_page_names_a_method_with_options_of_its_own(tmp_path: Path) -> None:
    shown = [block for block in blocks(PAGE) if block.language == "yaml"]
    assert len(shown) >= 4
    for block in shown:
        (tmp_path / "plan.yaml").write_text(block.text)
        find_method(check(read_yaml(tmp_path / "plan.yaml")["method"], MethodPlan, PAGE.name))


def test_the_example_is_one_file_and_one_entry_and_trains(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "fedclip_secure", tmp_path / "fedclip_secure", ignore=shutil.ignore_patterns("__pycache__", "assets")
    )
    for block in blocks(PAGE):
        if block.language == "python" and block.words[0] != _REGISTRY:
            (tmp_path / block.words[0]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.words[0]).write_text(block.text)
    _enter(tmp_path / _REGISTRY)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, "tests"],
        cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def _enter(registry: Path) -> None:
    """Write the page's import and entry into a copy of the registry."""
    imported, entry = (block.text for block in blocks(PAGE) if block.words == (_REGISTRY,))
    text, head = registry.read_text(), "METHODS: dict[str, Entry] = {\n"
    first = "from fedclip_secure.methods.base import Method\n"
    assert head in text
    assert first in text
    registry.write_text(text.replace(first, first + imported).replace(head, head + entry))


def _of_another_arm(name: str, option: str) -> bool:
    """Arms share a class, whose options are not all everybody's."""
    own = {
        "prompt_length": ("visual_prompt", "visual_prompt_deep"), "width": ("adapter",), "rank": ("lora",),
        "context_length": ("text_context",),
    }  # fmt: skip
    return name.startswith("fedtune:") and option in own and name.removeprefix("fedtune:") not in own[option]
