from __future__ import annotations

from pathlib import Path

import pytest

from fedclip_secure.data.sites import absent_classes, classes_in, folders_in, silo_name
from fedclip_secure.errors import ConfigError, DataError


def test_classes_are_those_of_any_site_and_hidden_files_are_no_images(tmp_path: Path) -> None:
    for folder in ("b/big_cat", "b/dog", "a/dog", ".hidden/x", "a/.cache"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "b/dog/1.png").touch()
    (tmp_path / "b/big_cat/.2.png").touch()
    (tmp_path / "notes.txt").touch()
    sites = folders_in(tmp_path)
    assert [site.name for site in sites] == ["a", "b"]
    assert classes_in(sites) == {"big_cat": "big cat", "dog": "dog"}
    assert [absent_classes(site, ["big_cat", "dog"]) for site in sites] == [["big_cat", "dog"], ["big_cat"]]
    with pytest.raises(ConfigError, match="is not a folder"):
        folders_in(tmp_path / "notes.txt")


@pytest.mark.parametrize("gone", ["c", "a/cow"], ids=["a site", "a class"])
def test_a_site_or_class_on_a_share_that_is_not_mounted_is_named_and_never_counts_as_absent(
    tmp_path: Path, gone: str
) -> None:
    (tmp_path / "a/dog").mkdir(parents=True)
    (tmp_path / gone).symlink_to("/nowhere/share")
    with pytest.raises(DataError, match=f"'{tmp_path / gone}': is a link to what is not there; mount or restore what"):
        absent_classes(folders_in(tmp_path)[0], ["cow", "dog"])


def test_a_folder_that_is_taken_for_a_systems_own_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("a/recycled", "a/dog", "a/.git"):
        (tmp_path / folder).mkdir(parents=True)
    assert classes_in(folders_in(tmp_path)) == {"dog": "dog"}
    assert (
        f"'{tmp_path / 'a'}': taken for a system's own and passed over: 'recycled'; rename what is not" in caplog.text
    )
    assert ".git" not in caplog.text


def test_a_silos_name_is_one_that_certificates_take() -> None:
    assert [silo_name(site) for site in ("St. Mary's", "oak", "--A_b--")] == ["st-mary-s", "oak", "a-b"]
    assert silo_name("病院").startswith("site-")
    assert silo_name("病院") != silo_name("医院")
