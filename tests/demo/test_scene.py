from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedclip_secure.config.fields import read_model
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.demo.labs import Options, check_data, check_options, set_scene, write_plan
from fedclip_secure.demo.settings import METHOD_NAMES, settings_of
from fedclip_secure.errors import ConfigError
from fedclip_secure.methods.registry import METHODS, find_method


def sites(folder: Path, *names: str, lacking: str = "") -> Path:
    for name in names:
        for kind in ("cat", "big_dog"):
            (folder / name / kind).mkdir(parents=True)
            if (name, kind) != (lacking, "cat"):
                Image.new("RGB", (8, 8)).save(folder / name / kind / "1.png")
    return folder


def test_folders_of_one_s_own_become_sites_and_classes(tmp_path: Path) -> None:
    data = sites(tmp_path / "data", "A_b", "c", "d", "e", lacking="c")
    scene = set_scene(Options(out=tmp_path, data=data, unseen="e"))
    assert [site.silo for site in scene.training] == ["a-b", "c", "d"]
    assert scene.unseen is not None
    assert scene.unseen.name == "e"
    assert scene.classes == {"big_dog": "big dog", "cat": "cat"}
    assert scene.absent(scene.training[1]) == ["cat"]


def test_without_an_unseen_site_all_train(tmp_path: Path) -> None:
    scene = set_scene(Options(out=tmp_path, data=sites(tmp_path / "data", "a", "b", "c")))
    assert (len(scene.training), scene.unseen) == (3, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unseen": "x"}, "--unseen x: there is no such site; .* holds a, b, c"),
        ({"unseen": "a"}, "2 site.s. .* would train; 3 are needed"),
        ({"kill_one": True}, "3 site.s. .* would train; 4 are needed to kill one"),
        ({"silos": 4}, "3 site.s. .* would train; 4 are needed"),
    ],
)
def test_too_few_sites_are_told(tmp_path: Path, options: dict[str, object], message: str) -> None:
    data = sites(tmp_path / "data", "a", "b", "c")
    with pytest.raises(ConfigError, match=message):
        set_scene(Options(out=tmp_path, data=data, **options))  # type: ignore[arg-type]


def test_sites_whose_names_would_be_one_in_a_certificate_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="same name in a certificate"):
        set_scene(Options(out=tmp_path, data=sites(tmp_path / "data", "a b", "a_b", "c")))


@pytest.mark.parametrize("layout", ["nothing", "missing"])
def test_data_that_holds_no_sites_is_told(tmp_path: Path, layout: str) -> None:
    if layout == "nothing":
        (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError, match=r"data': (holds no DIR/<site>/<class>/|is not a folder)"):
        set_scene(Options(out=tmp_path, data=tmp_path / "data"))


def plan_of(folder: Path, **options: Any) -> FederationPlan:
    chosen = Options(out=folder, data=sites(folder / "data", "A_b", "b", "c"), **options)
    check_options(chosen)
    write_plan(folder / "federation.yaml", set_scene(chosen), chosen, "https://localhost:8443")
    return read_model(folder / "federation.yaml", FederationPlan)


def test_the_plan_says_that_it_is_a_demonstration_and_of_whose_images(tmp_path: Path) -> None:
    own, options = plan_of(tmp_path), Options(out=tmp_path / "drawn")
    write_plan(tmp_path / "drawn.yaml", set_scene(options), options, "https://localhost:8443")
    drawn = read_model(tmp_path / "drawn.yaml", FederationPlan)
    assert drawn.purpose == "a demonstration with drawn images; its adapter is for nothing else"
    assert own.purpose == "a demonstration with images of your own; its adapter is for nothing else"
    assert drawn.contact == own.contact == "whoever ran `fedclip-agg demo` on this machine"
    assert "may be deleted at any time" in (drawn.retention or "")


def test_the_demo_knows_every_method_and_feddat_at_both_places() -> None:
    assert set(METHOD_NAMES) == {*METHODS, "feddat:blocks"}


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_demo_writes_a_plan_for_every_method(tmp_path: Path, method: str) -> None:
    plan = plan_of(tmp_path, method=method)
    once = find_method(plan.method).spec.one_sum
    assert plan.method.name == method.removesuffix(":blocks")
    assert (plan.privacy, plan.training.rounds == 1) == (None, once)
    assert not once or plan.training.optimizer.name == "sgd"


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_with_privacy_a_plan_holds_constants_or_the_demo_says_why_there_is_none(tmp_path: Path, method: str) -> None:
    if settings_of(method).private is None:
        with pytest.raises(ConfigError, match=f"--dp: every parameter gets noise, and {method} trains millions"):
            plan_of(tmp_path, method=method, dp=True)
        return
    plan = plan_of(tmp_path, method=method, dp=True)
    assert plan.privacy is not None
    assert plan.privacy.target_epsilon == 4.0
    once = (plan.privacy.sample_rate, plan.privacy.steps_per_round, plan.training.rounds) == (1, 1, 1)
    assert once == find_method(plan.method).spec.one_sum


def test_only_methods_that_train_the_whole_encoder_are_refused_with_privacy() -> None:
    refused = {name for name in METHOD_NAMES if settings_of(name).private is None}
    assert refused == {"fedtune:full", "fedavg_full", "fedprox_full"}


def test_the_rounds_that_were_asked_for_go_into_the_plan(tmp_path: Path) -> None:
    assert plan_of(tmp_path, method="fedtune:visual_bias", rounds=3).training.rounds == 3


def test_each_lab_of_the_demo_is_a_domain_of_its_own(tmp_path: Path) -> None:
    assert plan_of(tmp_path, method="fedapt").method.options["domains"] == {"a-b": ["a-b"], "b": ["b"], "c": ["c"]}


def test_feddat_on_blocks_is_feddat_at_another_place(tmp_path: Path) -> None:
    assert plan_of(tmp_path, method="feddat:blocks").method.options["place"] == "blocks"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fedclap"}, "--method fedclap: is unknown to this version; it has fedclip, "),
        ({"method": "discriminant", "rounds": 2}, "--rounds 2: discriminant adds each record up once"),
        ({"kill_one": True, "rounds": 1}, "--kill-one: a silo is killed in its second round at the earliest"),
        ({"kill_one": True, "method": "private_prototypes"}, "--kill-one: .* and this run has 1"),
    ],
)
def test_a_method_that_does_not_go_with_the_options_is_told_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(Options(out=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_output_inside_the_data_would_become_a_site(tmp_path: Path) -> None:
    data = sites(tmp_path / "data", "a", "b", "c")
    with pytest.raises(ConfigError, match="lies inside --data"):
        check_data(Options(out=data / "out", data=data))


def test_an_unknown_drawn_lab_is_told_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--unseen x: the drawn labs are birch, cedar"):
        check_data(Options(out=tmp_path / "out", unseen="x"))
    assert not (tmp_path / "out").exists()


def test_a_site_s_name_in_another_script_gets_one_that_certificates_take(tmp_path: Path) -> None:
    scene = set_scene(Options(out=tmp_path, data=sites(tmp_path / "data", "東京", "b", "c")))
    assert [site.silo.startswith("site-") for site in scene.training] == [False, False, True]


@pytest.mark.parametrize("name", ["a\nb", "aggregator"])
def test_names_that_cannot_be_are_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="holds control characters or is 'aggregator'"):
        set_scene(Options(out=tmp_path, data=sites(tmp_path / "data", name, "b", "c")))
