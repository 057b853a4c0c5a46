from __future__ import annotations

from pathlib import Path

import pytest

from fedclip_secure.config.silo import FolderData, ManifestData, SiloConfig, for_extraction, read_silo, write_silo
from fedclip_secure.errors import ConfigError

GOOD = "name: st-marys\ndata: {format: folder, path: images}\n"


def _read(tmp_path: Path, text: str) -> SiloConfig:
    path = tmp_path / "silo.yaml"
    path.write_text(text)
    return read_silo(path)


def test_relative_paths_count_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "silo"
    folder.mkdir()
    (folder / "silo.yaml").write_text(GOOD + "weights: /abs/w.pt\n")
    monkeypatch.chdir(tmp_path)
    config = read_silo(Path("silo/silo.yaml"))
    assert config.data.path == str(folder / "images")
    assert (config.identity, config.workdir) == (str(folder / "identity"), str(folder / "work"))
    assert config.weights == "/abs/w.pt"


def test_paths_beside_the_images_count_from_the_file_too(tmp_path: Path) -> None:
    path = tmp_path / "silo.yaml"
    path.write_text("name: a\ndata: {format: manifest, path: records.csv, root: /images}\n")
    data = read_silo(path).data
    assert isinstance(data, ManifestData)
    assert (data.path, data.root) == (str(tmp_path / "records.csv"), "/images")
    path.write_text("name: a\ndata: {format: folder, path: images, patients: patients.csv}\n")
    folder = read_silo(path).data
    assert isinstance(folder, FolderData)
    assert (folder.patients.file, folder.patients.normalise) == (str(tmp_path / "patients.csv"), [])


def test_ids_of_patients_may_be_the_same_but_for_case_and_leading_zeros(tmp_path: Path) -> None:
    path, how = tmp_path / "silo.yaml", "normalise: [strip_zeros, casefold]"
    path.write_text(f"name: a\ndata: {{format: folder, path: images, patients: {{file: p.csv, {how}}}}}\n")
    data = read_silo(path).data
    assert isinstance(data, FolderData)
    assert (data.patients.file, data.patients.normalise) == (str(tmp_path / "p.csv"), ["casefold", "strip_zeros"])
    path.write_text(f"name: a\ndata: {{format: manifest, path: records.csv, patients: {{{how}}}}}\n")
    data = read_silo(path).data
    assert isinstance(data, ManifestData)
    assert data.patients.normalise == ["casefold", "strip_zeros"]


def test_limit_needs_a_ledger_that_is_named(tmp_path: Path) -> None:
    """Else each federation's folder would have one of its own, and what the other spent would be spent again."""
    limit = "policy: {max_epsilon: 8}\n"
    with pytest.raises(
        ConfigError, match=r"`policy.max_epsilon` needs `ledger`: .*one folder for the whole organisation"
    ):
        _read(tmp_path, GOOD + limit)
    assert _read(tmp_path, GOOD + limit + "ledger: /srv/ledger\n").ledger == "/srv/ledger"
    assert _read(tmp_path, GOOD).ledger == str(tmp_path / "ledger")


def test_extraction_may_be_stricter_and_in_another_precision_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "silo.yaml"
    path.write_text(GOOD + "precision: bf16\n")
    config = read_silo(path)
    assert for_extraction(config, None, strict=False) == config
    other = for_extraction(config, "fp16", strict=True)
    assert isinstance(other.data, FolderData)
    assert (other.precision, other.data.strict) == ("fp16", True)


def test_file_that_enrol_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "silo.yaml"
    write_silo(path, "st-marys", 'a "quoted": # path', "w: #.pt")
    config = read_silo(path)
    assert config.name == "st-marys"
    assert isinstance(config.data, FolderData)
    assert config.data.path == str(tmp_path / 'a "quoted": # path')
    assert config.weights == str(tmp_path / "w: #.pt")


def test_missing_file_says_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"silo\.yaml: is missing; `fedclip-silo enroll` writes one"):
        read_silo(tmp_path / "silo.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: St\ndata: {format: folder, path: a}", "name: must have a-z, 0-9 and - only"),
        ("name: aggregator\ndata: {format: folder, path: a}", "name: 'aggregator' is the coordinator's own"),
        ("name: a\ndata: {format: dicom, path: a}", "data: `format` must be one of `folder`, `manifest`, `embeddings`"),
        ("name: a\ndata: {path: a}", "data: lacks `format`; add it"),
        ("name: a\ndata: images", "data: must be a mapping"),
        ("name: a\ndata: {format: folder}", "data.path: is missing; add it"),
        ("name: a\ndata: {format: embeddings, path: a, absent_classes: []}", "data.absent_classes: unknown key"),
        (GOOD + "plan: x", "plan: must be sha256: and 64 digits"),
        (GOOD + "roster: sha256:AB", "roster: must be sha256: and 64 digits"),
        ("name: a\ndata: {format: manifest, path: a, patients: b}", "data.patients.file: unknown key"),
        (
            "name: a\ndata: {format: folder, path: a, patients: {file: b, dicom: true}}",
            "patients are named by `file` or by `dicom`, not by both; leave out one",
        ),
        ("name: a\ndata: {format: manifest, path: a, columns: {age: b}}", "data.columns.age"),
        ("name: a\ndata: {format: folder, path: a, patients: 7}", "data.patients: must be a mapping of keys"),
        (
            "name: a\ndata: {format: folder, path: a, patients: {file: b, normalise: [lower]}}",
            "data.patients.normalise.0: input should be 'casefold' or 'strip_zeros'",
        ),
        ("name: a\ndata: {format: folder, path: a, strict: 1}", "data.strict: input should be a valid boolean"),
        (GOOD + "precision: fp8", "precision: input should be 'fp32', 'bf16' or 'fp16'"),
        (GOOD + "device: tpu", "device: input should be 'auto', 'cpu', 'cuda' or 'mps'"),
        (GOOD + "policy: {min_silos: 2}", "policy.min_silos: input should be greater than or equal to 3"),
        (GOOD + "policy: {require_privacy: no}", "policy.require_privacy: input should be a valid boolean"),
        (GOOD + "policy: {max_epsilon: 0}", "policy.max_epsilon: input should be greater than 0"),
        (GOOD + "policy: {delta: 1}", "policy.delta: input should be less than 1"),
        (GOOD + "policy: {require_privacy: true}", "`require_privacy` needs `max_epsilon`: privacy without a limit"),
        (GOOD + "policy:", "policy: must be a mapping"),
        (GOOD + "identity: ''", "identity: string should have at least 1 character"),
        ("", "is empty"),
    ],
)
def test_impossible_setting_is_refused_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"silo\.yaml: (?s:.*){message}"):
        _read(tmp_path, text)


def test_all_faults_stand_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 value") as caught:
        _read(tmp_path, GOOD + "device: tpu\nplan: x\nfoo: 1")
    assert str(caught.value).count("\n  ") == 3
