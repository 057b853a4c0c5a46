from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedclip_secure.aggregator.home import init_home
from fedclip_secure.config.fields import check, parse_duration, parse_name, read_model
from fedclip_secure.config.plan import FederationPlan, OpenClipModel
from fedclip_secure.errors import ConfigError

PLAN: dict[str, Any] = {
    "federation": "lung-xray",
    "server": "https://agg.example.org:8443",
    "model": {"name": "ViT-B-32", "pretrained": "openai", "config": "a.json", "image_window": [0, 4095]},
    "classes": {"normal": "no finding", "covid": "COVID-19", "pneumonia": "pneumonia"},
    "templates": ["a chest x-ray showing {}", "{}"],
    "splits": {"train": 0.6, "validation": 0.2, "test": 0.2},
    "method": {"name": "fedclip", "loss": "cross_entropy"},
    "training": {
        "rounds": 50,
        "local_epochs": 1,
        "batch_size": 32,
        "optimizer": {
            "name": "adam",
            "lr": 5e-5,
            "betas": [0.9, 0.98],
            "eps": 1e-6,
            "weight_decay": 0.02,
            "momentum": 0.0,
        },
        "seed": 0,
    },
    "secure_aggregation": {
        "min_silos": 3,
        "threshold": "malicious",
        "colluding": 1,
        "coordinate_clip": 0.1,
        "weights": "public",
        "public_weights": {"a": 1, "b": 2, "c": 3},
        "max_weight": 100,
        "verify_sum": "never",
    },
    "privacy": None,
    "deadlines": {"join": "10m", "share": "5m", "upload": "30m", "agree": "10m", "unmask": "10m"},
    "initial": "adapter.safetensors",
}


def plan_with(key: str, value: object) -> dict[str, Any]:
    """`PLAN` with the value at a key path replaced; `...` removes it."""
    data = copy.deepcopy(PLAN)
    *path, last = key.split(".")
    inner = data
    for part in path:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return data


def test_example_is_read() -> None:
    plan = check(PLAN, FederationPlan, "plan")
    assert list(plan.classes) == ["normal", "covid", "pneumonia"]
    assert plan.deadlines.upload == 1800
    assert isinstance(plan.model, OpenClipModel)
    assert plan.model.image_window == (0, 4095)


@pytest.mark.parametrize("name", ["hf-hub:somebody/clip", "local-dir:/tmp/clip", "a/b", "../clip"])
def test_an_encoder_is_named_as_open_clip_names_its_own(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.name: must have letters, digits"):
        check(plan_with("model.name", name), FederationPlan, "plan")


def test_file_that_init_writes_is_a_plan(tmp_path: Path) -> None:
    plan = init_home(tmp_path / "lung", "lung-xray", ["agg.example.org"], 8443).plan()
    assert (plan.federation, plan.server) == ("lung-xray", "https://agg.example.org:8443")
    assert plan.training.optimizer.lr == 5e-5
    assert plan.deadlines.share == 300


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("federation", "Lung", r"federation: must have a-z, 0-9 and - only, at most 63 \(found 'Lung'\)"),
        ("federation", "x" * 64, "federation: must have a-z"),
        ("federation", "x\n", "federation: must have a-z"),
        ("federation", "aggregator", "federation: 'aggregator' is the coordinator's own name"),
        ("federation", ..., "federation: is missing; add it"),
        ("server", "http://x", "server: must be https://HOST"),
        ("server", "https://x/path", "server: must be https://HOST"),
        ("server", "https://x:99999", "server: must be https://HOST"),
        ("server", "https://x:abc", "server: must be https://HOST"),
        ("server", "https://u:p@x", "server: must be https://HOST"),
        ("server", "https://x#y", "server: must be https://HOST"),
        ("server", "https://[::1", "server: "),
        ("model", "ViT-B-32", "model: must be a mapping"),
        ("model.name", "external", "model.dim: is missing"),
        ("model.image_window", [5, 5], "low < high"),
        ("model.image_window", ["a", 1], "model.image_window.0: input should be a valid integer"),
        ("model.image_window", [1], "model.image_window.1: is missing"),
        ("model.pretrained", "", "model.pretrained: "),
        ("model", {"name": "fedclip-tiny"}, "model: pretrained is missing; for fedclip-tiny, .* `pretrained: shipped`"),
        ("classes", {"a": "a"}, "classes: needs at least 2 classes"),
        ("classes", {"a": "a", "../b": "b"}, "'../b' cannot be a folder's name"),
        ("classes", {"a": "a", ".b": "b"}, "'.b' cannot be a folder's name"),
        ("classes", {"a": "a", "b\x1b[2K": "b"}, "cannot be a folder's name"),
        ("classes", {"a": "a", 1: "b"}, "classes.1: must be text, in quotes"),
        ("classes", {"a": "a", "b": None}, "classes.b: must be text"),
        ("classes", ["a", "b"], "classes: must be a mapping"),
        ("classes", [[["a"], "x"], ["b", "y"]], "classes: must be a mapping"),
        ("classes", [["a", "x"], ["a", "y"]], "classes: must be a mapping"),
        ("templates", [], "templates: "),
        ("templates", "a {}", "templates: input should be a valid list"),
        ("templates", ["a photo"], r"'a photo' must hold \{\} once"),
        ("templates", ["{} {}"], r"must hold \{\} once"),
        ("templates", ["a {}\x1b[1A"], "templates.0: holds a control character"),
        ("templates", ["a {}\u202e"], "templates.0: holds a control character"),
        ("splits.train", 0.7, "splits: train, validation and test must add up to 1"),
        ("splits.train", 0, "splits.train: input should be greater than 0"),
        ("method.loss", "hinge", "method.loss: input should be 'cross_entropy' or 'inbatch'"),
        ("training.rounds", 0, "training.rounds: input should be greater than or equal to 1"),
        ("training.rounds", None, "training.rounds: input should be a valid integer"),
        ("training.batch_size", True, "training.batch_size: input should be a valid integer"),
        ("training.batch_size", 32.0, "training.batch_size: input should be a valid integer"),
        ("training.batch_size", "32", "training.batch_size: input should be a valid integer"),
        ("training.optimizer.lr", 10**400, "training.optimizer.lr: is too large"),
        ("training.optimizer.lr", float("nan"), "training.optimizer.lr: input should be a finite number"),
        ("training.optimizer.lr", float("inf"), "training.optimizer.lr: input should be a finite number"),
        ("training.optimizer.lr", "5e-5", "training.optimizer.lr: input should be a valid number"),
        ("training.optimizer.lr", True, "training.optimizer.lr: input should be a valid number"),
        ("training.optimizer.betas", [0.9], "training.optimizer.betas.1: is missing"),
        ("secure_aggregation.min_silos", 2, "secure_aggregation.min_silos: input should be greater"),
        ("secure_aggregation.min_silos", 256, "secure_aggregation.min_silos: input should be less"),
        ("secure_aggregation.coordinate_clip", 0, "secure_aggregation.coordinate_clip: input should be greater"),
        ("secure_aggregation.max_weight", 2**29, "secure_aggregation.max_weight: input should be less"),
        ("secure_aggregation.public_weights", None, "`public_weights` and `weights: public` go together"),
        ("secure_aggregation.public_weights", {"a": 101}, r"public_weights.a must lie in 1..max_weight \(100\)"),
        ("secure_aggregation.public_weights", {"a": 0}, "public_weights.a must lie in 1..max_weight"),
        (
            "secure_aggregation.verify_sum",
            "sometimes",
            "secure_aggregation.verify_sum: input should be 'auto', 'always' or",
        ),
        ("deadlines.join", "10 m", "deadlines.join: must be a duration such as 30s"),
        ("deadlines.join", "0s", "deadlines.join: must be a duration"),
        ("deadlines.join", -5, "deadlines.join: input should be greater"),
        ("deadlines.join", 1.5, "deadlines.join: input should be a valid integer"),
        ("extra", 1, "extra: unknown key; check its spelling or remove it"),
        ("training.optimizer.lrr", 1, "training.optimizer.lrr: unknown key"),
    ],
)
def test_impossible_value_is_refused_with_its_key(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)^plan: .*\n  .*{message}"):
        check(plan_with(key, value), FederationPlan, "plan")


def test_all_faults_stand_in_one_message() -> None:
    data = plan_with("training.rounds", 0) | {"federation": "Lung", "foo": 1, "privacy": {"epsilon": 1}}
    with pytest.raises(ConfigError) as caught:
        check(data, FederationPlan, "federation.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "federation.yaml: 10 value(s) cannot be used:"
    faulty = [line.split(":")[0].strip().split(".")[0] for line in lines[1:]]
    assert faulty == ["federation", "training", *["privacy"] * 7, "foo"]


@pytest.mark.parametrize("data", [None, [], "text", 1])
def test_file_that_is_no_mapping_is_refused(data: object) -> None:
    with pytest.raises(ConfigError, match=r"^x: (is empty|must be a mapping)"):
        check(data, FederationPlan, "x")


def test_message_stays_short_where_aliases_unfold_to_billions(tmp_path: Path) -> None:
    rows = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)), "model: *a39"]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(rows))
    with pytest.raises(ConfigError) as caught:
        read_model(path, FederationPlan)
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("10m", 600), ("2h", 7200), ("7d", 604800), ("999999s", 999999)]
)
def test_duration_is_read(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "0d", "-1d", "1.5h", "10 m", "1w", "01h", "1000000s", "1h30m", "1H", "٣m"])
def test_text_that_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a duration such as 30s, 10m, 2h or 1d"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "Lung", "a b", "aggregator", "x" * 64, "a\n", "é"])
def test_text_that_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a name; use a-z, 0-9 and -"):
        parse_name(text)


def test_braces_in_phrases_and_templates_stay_as_they_are() -> None:
    data = plan_with("templates", ["a {} {x} {", "{{}}"]) | {"classes": {"a": "A {0}", "b": "B"}}
    prompts = check(data, FederationPlan, "plan").text_prompts()
    assert prompts[0] == ["a A {0} {x} {", "{A {0}}"]


# The digest


def _leaves(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(f"{prefix}.{key}".lstrip("."), item)]
    return [(prefix, value)]


OTHER = {
    "server": "https://other",
    "model.image_window": [0, 4094],
    "templates": ["{}", "a chest x-ray showing {}"],
    "method.loss": "inbatch",
    "training.optimizer.name": "sgd",
    "training.optimizer.betas": [0.9, 0.97],
    "secure_aggregation.threshold": "honest_but_curious",
    "secure_aggregation.verify_sum": "always",
    "splits.train": 0.7,
    "splits.validation": 0.1,
    "splits.test": 0.1,
}
TIED = {
    "splits.train": {"splits.test": 0.1},
    "splits.validation": {"splits.test": 0.3},
    "splits.test": {"splits.train": 0.7},
}
FIXED = {"privacy", "secure_aggregation.weights"}  # one value, or tied to a second key


def _other(key: str, value: Any) -> Any:
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, str):
        return "31m" if key.startswith("deadlines") else f"{value}x"
    return value + 1 if isinstance(value, int) else value / 3 + 0.01


@pytest.mark.parametrize(("key", "value"), [leaf for leaf in _leaves("", PLAN) if leaf[0] not in FIXED])
def test_digest_changes_with_every_value(key: str, value: object) -> None:
    data = plan_with(key, _other(key, value))
    for tied, to in TIED.get(key, {}).items():
        data["splits"][tied.split(".")[1]] = to
    assert check(data, FederationPlan, "plan").digest != check(PLAN, FederationPlan, "plan").digest


def test_digest_changes_with_the_kind_of_weights() -> None:
    plans = [plan_with("secure_aggregation.public_weights", None) for _ in range(2)]
    for plan, weights in zip(plans, ("equal", "masked"), strict=True):
        plan["secure_aggregation"]["weights"] = weights
    digests = {check(plan, FederationPlan, "plan").digest for plan in [*plans, PLAN]}
    assert len(digests) == 3


def test_digest_changes_with_the_order_of_classes() -> None:
    turned = plan_with("classes", dict(reversed(PLAN["classes"].items())))
    assert check(turned, FederationPlan, "plan").digest != check(PLAN, FederationPlan, "plan").digest


def test_digest_is_the_same_whatever_the_form_of_the_yaml(tmp_path: Path) -> None:
    turned = {key: PLAN[key] for key in sorted(PLAN)}
    texts = [
        yaml.safe_dump(PLAN, sort_keys=False, default_flow_style=True),
        "# comment\n" + yaml.safe_dump(turned, sort_keys=False).replace("10m", "600"),
        yaml.safe_dump(PLAN, sort_keys=False, indent=8),
    ]
    digests = set()
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        digests.add(read_model(path, FederationPlan).digest)
    assert digests == {check(PLAN, FederationPlan, "plan").digest}


def test_integer_where_a_number_is_asked_has_the_digest_of_the_number() -> None:
    one, same = plan_with("secure_aggregation.coordinate_clip", 1), plan_with("secure_aggregation.coordinate_clip", 1.0)
    assert check(one, FederationPlan, "a").digest == check(same, FederationPlan, "b").digest


# Privacy


PRIVACY: dict[str, Any] = {
    "unit": "record",
    "sample_rate": 0.05,
    "steps_per_round": 20,
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
    "update_divisor": 32.0,
    "delta": 1e-5,
    "max_retrains": 2,
}


def private_plan(**change: object) -> dict[str, Any]:
    """A plan with `PRIVACY`, changed at key paths; `...` removes."""
    data = plan_with("training.batch_size", ...)
    data["splits"] = {"train": 0.8, "validation": 0.0, "test": 0.2}
    data["privacy"] = dict(PRIVACY)
    for key, value in change.items():
        *path, last = key.split("__")
        inner = data
        for part in path:
            inner = inner[part]
        inner.pop(last) if value is ... else inner.update({last: value})
    return data


def test_a_plan_with_privacy_is_read() -> None:
    plan = check(private_plan(), FederationPlan, "plan")
    assert plan.privacy is not None
    assert plan.privacy.model_dump() == {**PRIVACY, "target_epsilon": None}


@pytest.mark.parametrize(("key", "value"), PRIVACY.items())
def test_digest_changes_with_every_value_of_privacy(key: str, value: object) -> None:
    other = "patient" if key == "unit" else value / 3 if isinstance(value, float) else 7
    changed = check(private_plan(**{f"privacy__{key}": other}), FederationPlan, "plan")
    assert changed.digest != check(private_plan(), FederationPlan, "plan").digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"privacy__noise_multiplier": 0}, "privacy.noise_multiplier: input should be greater than or equal to 0.001"),
        (
            {"privacy__noise_multiplier": 1e-154},
            "privacy.noise_multiplier: input should be greater than or equal to 0.001",
        ),
        ({"privacy__noise_multiplier": ...}, "needs `noise_multiplier` or `target_epsilon`, and not both"),
        ({"privacy__target_epsilon": 3.0}, "needs `noise_multiplier` or `target_epsilon`, and not both"),
        ({"privacy__sample_rate": 0}, "privacy.sample_rate: input should be greater than 0"),
        ({"privacy__sample_rate": 1.5}, "privacy.sample_rate: input should be less than or equal to 1"),
        ({"privacy__delta": 0.5}, "privacy.delta: input should be less than or equal to 0.01"),
        ({"privacy__max_grad_norm": -1}, "privacy.max_grad_norm: input should be greater than 0"),
        ({"privacy__unit": "image"}, "privacy.unit: input should be 'record' or 'patient'"),
        ({"privacy__epsilon": 8}, "privacy.epsilon: unknown key"),
        ({"splits__validation": 0.1, "splits__test": 0.1}, "splits.validation must be 0"),
        (
            {"secure_aggregation__weights": "masked", "secure_aggregation__public_weights": None},
            "secure_aggregation.weights must be `equal` or `public`",
        ),
        ({"training__batch_size": 32}, "leave out training.batch_size and training.local_epochs"),
        ({"training__local_epochs": 2}, "leave out training.batch_size and training.local_epochs"),
    ],
)
def test_what_would_let_numbers_of_records_out_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(private_plan(**change), FederationPlan, "plan")


def test_a_plan_without_privacy_needs_a_batch_size() -> None:
    with pytest.raises(ConfigError, match=r"training\.batch_size is missing; add it"):
        check(plan_with("training.batch_size", ...), FederationPlan, "plan")


# Keys that version 0.1 did not have

PRIVATE = {
    **PLAN,
    "splits": {"train": 0.8, "validation": 0.0, "test": 0.2},
    "training": {"rounds": 5, "optimizer": {"lr": 1e-3}},
    "privacy": {
        "unit": "record", "sample_rate": 0.05, "steps_per_round": 30, "noise_multiplier": 1.0, "max_grad_norm": 0.5,
        "update_divisor": 64.0, "delta": 1e-5,
    },
}  # fmt: skip
ACCURACY: dict[str, Any] = {
    "data": "drawn labs, three seeds",
    "without_noise": {"normal": 0.9, "covid": 0.8, "pneumonia": 1.0},
    "with_noise": {"normal": 0.9, "covid": 0.5, "pneumonia": 0.0},
}
FREE_TEXT = {"purpose": "triage", "contact": "privacy@agg.example.org", "retention": "deleted after two years"}


def test_a_plan_without_the_new_keys_has_the_digest_that_version_0_1_gave_it() -> None:
    digests = [check(plan, FederationPlan, "plan").digest.hex() for plan in (PLAN, PRIVATE)]
    assert digests == [
        "6ca4b88433e6effea7c73a9678488cd3c79ed6f4ff9c486533730541807e7862",
        "a56a69d433a5875a77de4364e34d4eca5cd219081d89377a0119815952faac18",
    ]
    example = read_model(Path(__file__).parents[2] / "silo_configs/federation.yaml", FederationPlan)
    bare = example.model_copy(update=dict.fromkeys(FREE_TEXT))
    assert bare.digest.hex() == "fb45a358113df4cb7e533e95060d7cefea55321b5a0f1dcd9b899897f962155d"


def test_the_new_keys_are_agreed_on_like_all_others() -> None:
    plain, private = check(PLAN, FederationPlan, "plan"), check(PRIVATE, FederationPlan, "plan")
    for key, text in FREE_TEXT.items():
        said = check({**PLAN, key: text}, FederationPlan, "plan")
        assert said.digest != plain.digest
        assert said.model_dump(mode="json")[key] == text
        assert key not in plain.model_dump(mode="json")
    measured = check({**PRIVATE, "privacy": {**PRIVATE["privacy"], "accuracy": ACCURACY}}, FederationPlan, "plan")
    assert measured.digest != private.digest
    assert check(measured.model_dump(mode="json"), FederationPlan, "plan") == measured


@pytest.mark.parametrize(
    ("changed", "fact"),
    [
        ({"with_noise": {"normal": 0.9, "covid": 0.5}}, "accuracy.with_noise must have a share for each of normal, c"),
        ({"without_noise": {**ACCURACY["without_noise"], "cat": 0.5}}, "accuracy.without_noise must have a share"),
        ({"with_noise": {"normal": 0.9, "covid": 0.5, "pneumonia": 1.1}}, "with_noise.pneumonia: .*less than or equal"),
        ({"data": ""}, "accuracy.data: "),
        ({"data": "x\u202e"}, "accuracy.data: holds a control character"),
    ],
)
def test_accuracies_are_shares_of_the_plans_classes(changed: dict[str, Any], fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        check(
            {**PRIVATE, "privacy": {**PRIVATE["privacy"], "accuracy": {**ACCURACY, **changed}}}, FederationPlan, "plan"
        )
