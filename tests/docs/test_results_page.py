"""The tables of docs/results.md, against the experiments that they come from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedclip_secure.methods.registry import METHODS
from fedclip_secure.simulate.experiment import read_experiment
from tests.federation.processes import ROOT

PAGE = (ROOT / "docs" / "results.md").read_text("utf-8")
EXPERIMENTS = sorted((ROOT / "benchmarks" / "experiments").glob("*.yaml"))
SAME = {"fedtune:head": "linear_probe", "fedtune:full": "fedavg_full"}  # two names of one method


def rows_of(name: str) -> list[list[str]]:
    """The table of the experiment `name`, line by line, without its heading."""
    (found,) = re.findall(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", PAGE, flags=re.DOTALL)
    lines = [line for line in found.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_has_a_table_with_each_of_its_methods(path: Path) -> None:
    experiment, rows = read_experiment(path), rows_of(path.stem)
    labels = [row[0] for row in rows]
    assert [label for label in dict.fromkeys(labels) if label in {arm.label for arm in experiment.methods}] == [
        arm.label for arm in experiment.methods
    ]
    assert ("zero-shot" in labels) == ("zero_shot" in experiment.baselines)


def test_the_page_names_no_experiment_that_is_not_there() -> None:
    assert set(re.findall(r"<!-- ([a-z0-9-]+) -->", PAGE)) == {path.stem for path in EXPERIMENTS}


@pytest.mark.parametrize("name", ["labs", "pacs"])
def test_every_method_is_compared_on_both_data(name: str) -> None:
    arms = read_experiment(ROOT / "benchmarks" / "experiments" / f"{name}.yaml").methods
    assert {arm.method.name for arm in arms} == {SAME.get(method, method) for method in METHODS}
    assert {arm.method.options.get("place", "features") for arm in arms if arm.method.name == "feddat"} == {
        "features",
        "blocks",
    }
