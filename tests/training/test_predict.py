from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import numpy as np
import pytest

from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import ExternalModel, FederationPlan
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.data.listing import Reason
from fedclip_secure.errors import ConfigError, DataError
from fedclip_secure.model.state import AdapterState, Layout
from fedclip_secure.training.evaluation.predict import Predictions, find_images, predict, to_csv
from fedclip_secure.training.prepare import prepare


def predictions(paths: list[str], classes: tuple[str, ...] = ("cat", "dog")) -> Predictions:
    return Predictions(classes, tuple(map(Path, paths)), np.tile([0.25, 0.75], (len(paths), 1)), ())


def rows(data: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")))


def test_row_has_path_class_probability_and_every_class() -> None:
    assert to_csv(predictions(["a/b.png"])) == (
        b"path,class,probability,cat,dog\r\na/b.png,dog,0.750000,0.250000,0.750000\r\n"
    )


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝"])
def test_no_cell_is_a_formula_to_a_spreadsheet(start: str) -> None:
    name = f"{start}HYPERLINK(1)"
    head, row = rows(to_csv(predictions([f"{name}.png"], ("cat", name))))
    assert head == ["path", "class", "probability", "cat", f"'{name}"]
    assert row[:2] == [f"./{name}.png", f"'{name}"]
    assert Path(row[0]) == Path(f"{name}.png"), "the path still names the file"


def test_commas_quotes_line_breaks_and_foreign_bytes_come_back_as_they_were() -> None:
    names = ['a,"b"\nc.png', os.fsdecode(b"latin-\xe9.png"), "肺.png"]
    assert [row[0] for row in rows(to_csv(predictions(names)))[1:]] == names


def test_images_are_found_at_any_depth_each_once_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.JPEG", "a/.hidden.png", "a/notes.txt", "odd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_images([tmp_path / "odd", tmp_path, tmp_path / "b.png"])
    assert [file.path for file in found.files] == [tmp_path / name for name in ("odd", "a/z.JPEG", "b.png")]
    assert [(Path(one.path).name, one.reason) for one in found.left_out] == [
        ("notes.txt", Reason.NO_IMAGE),
        (".hidden.png", Reason.PASSED_OVER),
    ]
    with pytest.raises(DataError, match="nothing': is no file and no folder"):
        find_images([tmp_path, tmp_path / "nothing"])


def test_external_model_is_refused_with_what_to_do_instead(tower_plan: FederationPlan, random_tower: Path) -> None:
    prepared = prepare(tower_plan, random_tower)
    layout = Layout(tuple((entry.name, tuple(entry.shape)) for entry in prepared.lock.layout))
    state = AdapterState.from_safetensors(prepared.initial_file, layout, "initial")
    external = ExternalModel(name="external", dim=8, text_features="prompts.safetensors")
    contract = Contract(tower_plan.model_copy(update={"model": external}), prepared.lock)
    silo = SiloConfig.model_validate({"name": "lab", "data": {"format": "embeddings", "path": "x"}})
    with pytest.raises(ConfigError, match=r"no encoder for images runs here.*`fedclip-silo evaluate`"):
        predict(silo, contract, state, [Path("x.png")], lambda _: None)
