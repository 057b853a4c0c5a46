from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fedclip_secure.data.dataset import ImageFile
from fedclip_secure.data.manifest import read_manifest, with_patients
from fedclip_secure.data.patients import likes, normalised, unit_of
from fedclip_secure.names import Normalisation

BOTH: tuple[Normalisation, ...] = ("casefold", "strip_zeros")
CASE, ZEROS = BOTH[:1], BOTH[1:]


@pytest.mark.parametrize(
    ("patient", "how", "same"),
    [
        ("P001", (), "P001"),
        ("P001", ("casefold",), "p001"),
        ("P001", ("strip_zeros",), "P1"),
        ("P001", BOTH, "p1"),
        ("P100", BOTH, "p100"),
        ("P000", BOTH, "p0"),
        ("0", BOTH, "0"),
        ("007-P-040-x00", BOTH, "7-p-40-x0"),
        ("1.02.0030", BOTH, "1.2.30"),
        ("10010", BOTH, "10010"),
        ("Straße", BOTH, "strasse"),
        ("٠٠٧", BOTH, "٠٠٧"),  # no digits of ASCII: left as they are
    ],
)
def test_id_without_what_may_be_disregarded(patient: str, how: tuple[Normalisation, ...], same: str) -> None:
    assert normalised(patient, how) == same
    assert normalised(same, how) == same


def test_ids_that_are_alike_but_for_what_is_not_disregarded_are_found() -> None:
    patients = ["P1", "p1", "P001", "P2", "p3", "P03", "P4", "P4"]
    assert likes(patients, ()) == [("P001", "P1", "p1"), ("P03", "p3")]
    assert likes(patients, CASE) == [("P001", "P1"), ("P03", "p3")]
    assert likes(patients, ZEROS) == [("P001", "p1"), ("P03", "p3")]
    assert likes(patients, BOTH) == []


LIST = "path,label,patient\na.png,cat,P1\nb.png,dog,p001\nc.png,dog, P1 \nd.png,dog,P2\n"


def units(files: list[ImageFile]) -> list[bytes | None]:
    return [file.unit for file in files]


@pytest.mark.parametrize("other", ["mu\u0308ller1", "MÜLLER1", "mü\u200bller1", "ｍüller1", "müller\ufeff1"])
def test_letters_in_any_case_and_encoding_are_one_id_where_silo_yaml_says_so(other: str) -> None:
    assert unit_of(other, ()) != unit_of("müller1", ())
    assert likes(["müller1", other], ()) != []
    assert unit_of(other, ["casefold"]) == unit_of("müller1", ["casefold"])
    assert likes(["müller1", other], ["casefold"]) == []


def test_patients_are_told_apart_as_they_are_written_and_the_log_names_likes_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "records.csv"
    path.write_text(LIST)
    with caplog.at_level(logging.WARNING):
        found = units(read_manifest(path, tmp_path, ("cat", "dog")))
    assert len(set(found)) == 3
    assert found[0] == found[2], "space around an id is never part of it"
    (said,) = caplog.messages
    assert said.startswith(
        f"'{path}': 1 group(s) of patients' ids differ by case, encoding or leading zeros alone ('P1' and 'p001')"
    )
    assert "set data.patients.normalise in silo.yaml before the first run" in said


def test_warning_names_a_few_and_counts_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "patients.csv"
    rows = [f"{number}{mark}.png,{mark}{number}" for number in range(5) for mark in "Pp"]
    path.write_text("\n".join(["path,patient", *rows]))
    files = [ImageFile(tmp_path / row.split(",")[0], 0) for row in rows]
    with caplog.at_level(logging.WARNING):
        with_patients(files, path, tmp_path)
    (said,) = caplog.messages
    assert "5 group(s)" in said
    assert "('P0' and 'p0'; 'P1' and 'p1'; 'P2' and 'p2'; ...)" in said


def test_patients_are_one_where_silo_yaml_says_what_to_disregard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "records.csv"
    path.write_text(LIST)
    with caplog.at_level(logging.WARNING):
        found = units(read_manifest(path, tmp_path, ("cat", "dog"), normalise=BOTH))
        assert found[0] == found[1] == found[2] != found[3]
        path.write_text(LIST.replace(",label", "").replace(",cat", "").replace(",dog", ""))
        files = [ImageFile(tmp_path / f"{name}.png", 0) for name in "abcd"]
        assert units(with_patients(files, path, tmp_path, normalise=BOTH)) == found
    assert caplog.messages == []
