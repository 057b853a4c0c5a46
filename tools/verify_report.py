#!/usr/bin/env python3
"""Check a privacy report of fedclip-secure, silo's or federation's, without any code of fedclip-secure.

    pip install cryptography cbor2 dp-accounting
    python verify_report.py report.json [--plan sha256:...] [--roster sha256:...]

Reads one file and nothing else. It prints every check, what no file can show, and the verdict; the exit code is 0 if
all checks passed. Whatever comes from the file is printed in ASCII: a stranger's text cannot act on the terminal.
The same checks as `fedclip-silo verify`, written a second time from the format alone: docs/report.schema.json names
the fields. Texts are known by hash (TEXTS), since a program that shares no code cannot know them otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

import cbor2
import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from dp_accounting.pld import pld_pmf
from scipy.special import log_ndtr, logsumexp
from scipy.stats import binom

Json = Any
LABELS = {name: f"fedclip/v1/{name}\0".encode() for name in ("privacy-report", "ledger-entry", "receipt")}
SLACK = 0.0002  # of an epsilon, relative above 1: by so much two programs differ in their grids and roundings
GROUPS = [1, 2, 5, 10]
MOST_BYTES = 1 << 28
MOST_CANARIES = 20_000
HOUR = 3600  # seconds
MOST_STEPS = 2_000_000
GRIDS = (512, 2048, 8192, 32768, 131072)  # points that the losses of one step lie on
MOST_POINTS = 4_000_000  # after composition; about 0.5 GB
WHOLE_ORDERS = (*range(2, 64), *range(64, 1025, 16))
TESTS = (  # of a whole audit, in order
    "sensitivity",
    "records_apart",
    "noise_deviation",
    "noise_shape",
    "noise_across_steps",
    "noise_across_coordinates",
    "noise_across_runs",
    "batch_sizes",
    "participation",
    "membership_independence",
    "membership_across_runs",
    "trainer_keys",
    "trainer",
    "trainer_noise",
    "trainer_noise_across_steps",
    "canary_scores",
    "one_run_attack",
)
LATER_TESTS = {"records_apart", "trainer_keys", "trainer_noise", "trainer_noise_across_steps"}  # not in version 0.1
RELEASES = dict.fromkeys(  # noisy sums of one step, by the method's name
    (
        *("fedclip", "linear_probe", "private_prototypes", "discriminant", "fedapt", "fedavg_full", "fedprox_full"),
        *("fedtune:text_context", "fedtune:text_bias", "fedtune:visual_prompt", "fedtune:visual_prompt_deep"),
        *("fedtune:adapter", "fedtune:visual_bias", "fedtune:layernorm", "fedtune:lora", "fedtune:head"),
        "fedtune:full",
    ),
    1,
) | {"feddat": 2}
FIRST_VERSION = (
    "It is of version 1. Such a report can still be written: it does not hold which code trained, when it was tested, "
    "and whether the limit was changed, and what it calls tested is the silo's word."
)
SENTENCES = {
    "claim": "Adding or removing any one {unit} makes nothing that training at {silo} puts into its uploads to "
    "federation {federation}, or into any model made from them, more than {times} times as likely "
    "(ε = {epsilon:.4f}), apart from a probability of {delta} (δ).",
    "lifetime": "No {unit} takes part in a run that would take its charges, over all runs of this ledger, above "
    "ε = {epsilon:.4g} at δ = {delta}. This bounds its lifetime if the limit stood from the first run on and is "
    "never raised.",
    "changed limit": "The silo's limit is ε = {epsilon:.4g} at δ = {delta} now, and was another before: it bounds no "
    "lifetime.",
    "together": "Over all rounds that the plan of federation {federation} allows, ε = {worst:.4f} holds for any one "
    "{unit} at one silo alone, and {everywhere} for a person with one {unit} at every silo, both with δ = {delta}.",
}
TEXTS = {  # by part and id: the first 16 digits of a SHA-256
    "assumptions/all-runs-fit": "ee66ad67114c52b6",
    "assumptions/alone": "afcdb7f5d897e6f8",
    "assumptions/arithmetic": "cba927cfc94bca46",
    "assumptions/audit-after": "51c5f6c04b10fd74",
    "assumptions/audit-before": "d0fa39fa09953a36",
    "assumptions/audit-in-the-hour": "cb70a4d545655c67",
    "assumptions/audited-other": "a63a436b0ec915de",
    "assumptions/audited-same": "ed683948a1dc0b1c",
    "assumptions/audited-unknown": "4c36c6cb0b9f6126",
    "assumptions/clock": "2d34cd1db2e4fcfa",
    "assumptions/code": "f82f9d78ddc7eed5",
    "assumptions/code-changed": "db3d4304147827db",
    "assumptions/code-nothing-trained": "278bd10cf6a9adaa",
    "assumptions/code-of-report": "b7e5491b35d51729",
    "assumptions/code-one": "4b64ddb0971445ea",
    "assumptions/code-unrecorded": "9e219456a989ec5a",
    "assumptions/delta": "29799b7b7d92b678",
    "assumptions/features": "ae11b30212a999a3",
    "assumptions/features-apart": "5381eb367cc263d8",
    "assumptions/features-external": "2dd852052726037d",
    "assumptions/features-in-batches": "0ee8ba1bef945d34",
    "assumptions/features-none": "f7da0573f8eff7d7",
    "assumptions/floating-point": "2f72acb9d1afed95",
    "assumptions/ledger": "6040c0802a4eb600",
    "assumptions/ledger-unreceipted": "7127027710919d0e",
    "assumptions/limit-below-run": "27dc91b590312d44",
    "assumptions/limit-kept": "0b7e83f1b029573a",
    "assumptions/limit-lowered": "1c9fb5d547a9a202",
    "assumptions/limit-raised": "1b91d007144c005b",
    "assumptions/limit-removed": "15b747b4203b1bc0",
    "assumptions/limit-unrecorded": "41d966d5ce84af80",
    "assumptions/masks": "a40c57850deea927",
    "assumptions/mechanism": "f3a93b55689d6483",
    "assumptions/mechanism-failed": "752ae2e5a9f1e4b3",
    "assumptions/mechanism-said": "826a7ef731c500b8",
    "assumptions/mechanism-unaudited": "e06b44cb3cfa3720",
    "assumptions/mechanism-untested": "83926a5d2cb7b4e5",
    "assumptions/no-limit": "d3024ea4b47c8aa3",
    "assumptions/nothing-spent": "68b0fd3386db4771",
    "assumptions/runs-fit": "93fe639caa621300",
    "assumptions/second-accountant": "1382021282c95784",
    "assumptions/second-accountant-differs": "515bd62c417a6d62",
    "assumptions/second-accountant-none": "82c0ba4db898bedc",
    "assumptions/second-ledger": "93f7ada9acba0a0d",
    "assumptions/sums": "f5205e2b99685c95",
    "assumptions/units-patient": "13a6cd1a9e0da257",
    "assumptions/units-record": "9db7da58d6ec7825",
    "mechanism/one-sum": "e16aafbf1d898829",
    "mechanism/steps": "6160c9a3a64173a8",
    "not_covered/choices": "66776349f5530c27",
    "not_covered/copies": "f85836f0266c2b18",
    "not_covered/elsewhere": "1758db6b5f7f43da",
    "not_covered/knowledge": "3256a33dde36cffc",
    "not_covered/no-privacy": "645fd250718f4d0a",
    "not_covered/several": "e09d9eef4aa5ae7b",
    "not_covered/trials": "ac8044a194165ee3",
    "scope/bound": "55c3a9c7a232c7ed",
    "scope/counts": "1aad78e806b4c5be",
    "scope/identity": "6a1020e0f0e6b518",
    "scope/ledger": "8002234c7ce43aa3",
    "scope/logs": "911e6d1662be5fb3",
    "scope/presence": "1c2f255feb997537",
    "scope/protocol": "b7b5dd54f320c15f",
    "scope/results": "38ef87aee0b7cb92",
    "scope/timing": "32bb28c644a204d2",
    "scope/update": "69d7a3b561e59280",
    "scope/update-plain": "23aea4cd6f32adf0",
    "scope/weight": "245818ec8da5dc9c",
    "scope/weight-masked": "34e24c8a715a2707",
    "trust/fallback": "da05ea3ef3aa72aa",
    "trust/local-machine": "354f3edb39373c63",
    "trust/no-fallback": "391c7473f8be0a6d",
    "trust/single": "13963215664aeee6",
    "trust/sum": "8ce17de3fd37001e",
    "trust/threshold": "f8051fc1b643a9ce",
    "trust/threshold-weak": "73c1d26c1f991a4d",
}
CANNOT = [
    "which program ran on the silo's machine, or that noise was added",
    "that the tests of the mechanism were run: the silo says so",
    "that there is no second ledger",
    "that no newer rounds were left out together with their receipts: the coordinator's report shows those",
    "that the fingerprints are those that people compared: compare them yourself",
]


class WrongError(Exception):
    """A check did not pass; the text is the fact."""


def need(condition: bool, fact: str) -> None:
    """Fail the check that is going on."""
    if not condition:
        raise WrongError(fact)


# Bytes


def canonical(value: Json) -> bytes:
    """Sorted keys, no white space, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def parse(data: bytes) -> Json:
    """Read the file; bytes that are not the canonical form are refused."""

    def refuse(name: str) -> NoReturn:
        raise WrongError(f"the number {name}")

    need(len(data) <= MOST_BYTES, "it is larger than any report")
    value = json.loads(data.decode("ascii"), parse_constant=refuse)
    check_plain(value, 20)
    need(canonical(value) == data, "the bytes are not the one form that can be signed")
    return value


def check_plain(value: Json, depth: int) -> None:
    """Nothing too deep, no integer beyond 2^53, no half characters."""
    if isinstance(value, dict | list):
        need(depth > 0, "arrays and objects are too deep in each other")
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            check_plain(item, depth - 1)
    elif isinstance(value, str):
        value.encode()
    elif isinstance(value, int):
        need(abs(value) <= 2**53, "an integer beyond 2^53")


def signed_by(key: str, signature: str, data: bytes) -> bool:
    """Ed25519, all in hexadecimal digits but the data."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), data)
    except InvalidSignature:
        return False
    return True


def cbor_hash(value: Json) -> str:
    """SHA-256 over canonical CBOR."""
    return hashlib.sha256(cbor2.dumps(value, canonical=True)).hexdigest()


def text_hash(value: Json) -> str:
    """What TEXTS holds of a text."""
    return hashlib.sha256(canonical(value)).hexdigest()[:16]


# Forms


class Maybe(NamedTuple):
    """This form, or null."""

    form: Any


class Absent(NamedTuple):
    """This form, or no such key; never null."""

    form: Any


class Many(NamedTuple):
    """A list of so many at most."""

    form: Any
    most: int = 10**9


def check_form(value: Json, form: Any, where: str) -> None:
    """Exact keys and types all the way down: a text is a pattern, a set lists all values, a function decides."""
    if isinstance(form, Maybe):
        if value is not None:
            check_form(value, form.form, where)
    elif isinstance(form, Many):
        need(isinstance(value, list) and len(value) <= form.most, f"{where} is no list, or too long")
        for number, item in enumerate(value):
            check_form(item, form.form, f"{where}.{number}")
    elif isinstance(form, dict):
        need(isinstance(value, dict), f"{where} is no object")
        left_out = {name for name, inner in form.items() if isinstance(inner, Absent) and name not in value}
        odd = sorted(set(value) ^ set(form) - left_out)
        need(not odd, f"{where} lacks or may not have {', '.join(odd)[:100]}")
        for name, inner in value.items():
            known = form[name]
            check_form(inner, known.form if isinstance(known, Absent) else known, f"{where}.{name}")
    elif isinstance(form, str):
        need(isinstance(value, str) and re.fullmatch(form, value) is not None, f"{where} has a wrong form")
    elif isinstance(form, set):
        need(isinstance(value, str | bool) and value in form, f"{where} is none of what it can be")
    else:
        need(bool(form(value)), f"{where} has a wrong form")


def whole(low: int, high: int = 2**53) -> Callable[[Json], bool]:
    """An integer of a range; true is none."""
    return lambda value: type(value) is int and low <= value <= high


def real(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Callable[[Json], bool]:
    """A number with a decimal point, of a range; with `above`, not its lower end."""
    return lambda value: type(value) is float and low <= value <= high and not (above and value == low)


NOISE = real(1e-3, 1e6)  # beyond them squares over- and underflow


def is_fraction(value: Json) -> bool:
    """Between 0 and 1."""
    return type(value) is float and 0 < value < 1


CONTROL = r"\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069"
TEXT = rf"[^{CONTROL}]{{1,500}}"
PLAIN = r"[ -~\u00a1-\u00ac\u00ae-\u00ff]{1,500}"
WORDS = r"(?s).{0,2000}"
MEMBER = r"[a-z0-9-]{1,63}"
NAME = r"(?!aggregator$)[a-z0-9-]{1,63}"
HEX16, HEX32, HEX64 = "[0-9a-f]{32}", "[0-9a-f]{64}", "[0-9a-f]{128}"
WIRE = "([0-9a-f]{2}){1,1000}"
POSITIVE, BOOLEAN = real(0, above=True), {True, False}
EPSILON, PROBABILITY = real(0, 1e6), real(0, 1)
UNIT = {"record", "patient"}
OPEN_CLIP = {
    "name": "[A-Za-z0-9._-]{1,500}",
    "pretrained": TEXT,
    "config": Maybe(TEXT),
    "image_window": Maybe(lambda v: isinstance(v, list) and [type(i) for i in v] == [int, int] and v[0] < v[1]),
    "tokenizer": Absent(TEXT),
}
TIMM = {
    "name": lambda v: type(v) is str and re.fullmatch("timm/[a-z0-9_]+", v) is not None and len(v) <= 500,
    "pretrained": TEXT,
    "image_window": OPEN_CLIP["image_window"],
}
EXTERNAL = {"name": {"external"}, "dim": whole(2, 65536), "text_features": TEXT}
PREPROCESSING = {
    "size": whole(1, 4096),
    "mean": lambda v: isinstance(v, list) and [type(i) for i in v] == [float] * 3,
    "std": lambda v: isinstance(v, list) and [type(i) for i in v] == [float] * 3,
    "interpolation": {"bicubic", "bilinear"},
    "resize_mode": {"shortest", "longest", "squash"},
}
ENCODERS = {
    "open_clip": {
        "kind": {"open_clip"},
        "name": TEXT,
        "config": lambda v: isinstance(v, str),
        "weights_sha256": HEX32,
        "tokens_sha256": Absent(HEX32),
        "preprocessing": PREPROCESSING,
        "dim": whole(2),
        "logit_scale": POSITIVE,
    },
    "timm": {
        "kind": {"timm"},
        "name": TIMM["name"],
        "weights_sha256": HEX32,
        "preprocessing": PREPROCESSING,
        "pool": {"token", "avg", "avgmax", "max", "map"},
        "dim": whole(2),
    },
    "external": {
        "kind": {"external"},
        "dim": whole(2),
        "text_features_sha256": HEX32,
        "logit_scale": POSITIVE,
    },
}


def is_plain(value: Json) -> bool:
    """A truth value, a number that is not too large, or a text."""
    if type(value) is str:
        return re.fullmatch(TEXT, value) is not None
    return type(value) is bool or whole(-(2**53))(value) or (type(value) is float and math.isfinite(value))


def is_method(value: Json) -> bool:
    """A name, a loss, and options of plain values, of lists of them, or of objects of both."""
    if not isinstance(value, dict):
        return False

    def is_few(item: Json) -> bool:
        return all(map(is_plain, item)) if isinstance(item, list) else is_plain(item)

    def is_option(item: Json) -> bool:
        if not isinstance(item, dict):
            return is_few(item)
        return all(is_plain(key) and is_few(inner) for key, inner in item.items())

    keys, plain = set(value), {"name": value.get("name"), "loss": value.get("loss")}
    check_form(plain, {"name": TEXT, "loss": {"cross_entropy", "inbatch"}}, "plan.method")
    named = all(re.fullmatch("[a-z][a-z0-9_]{0,62}", key) for key in keys)
    return keys >= set(plain) and named and all(is_option(value[key]) for key in keys - set(plain))


def is_shares(value: Json) -> bool:
    """A share for each of some names."""
    named = isinstance(value, dict) and all(re.fullmatch(TEXT, name) for name in value)
    return named and all(PROBABILITY(share) for share in value.values())


def form_of_model(value: Json) -> Any:
    """By its name: the open_clip one where it has none of the others'."""
    name = value.get("name")
    if isinstance(name, str) and name.startswith("timm/"):
        return TIMM
    return EXTERNAL if name == "external" else OPEN_CLIP


PLAN = {
    "federation": NAME,
    "server": TEXT,
    "model": lambda v: check_form(v, form_of_model(v), "plan.model") is None,
    "classes": Many(lambda v: isinstance(v, list) and [type(part) for part in v] == [str, str]),
    "templates": Many(TEXT, 1000),
    "splits": {"train": is_fraction, "validation": real(0, 1), "test": real(0, 1)},
    "method": is_method,
    "training": {
        "rounds": whole(1, 100_000),
        "local_epochs": whole(1, 1000),
        "batch_size": Maybe(whole(1, 65536)),
        "optimizer": {
            "name": {"adam", "adamw", "sgd"},
            "lr": POSITIVE,
            "betas": lambda v: isinstance(v, list) and len(v) == 2 and all(map(is_fraction, v)),
            "eps": POSITIVE,
            "weight_decay": real(0),
            "momentum": lambda v: real(0, 1)(v) and v < 1,
        },
        "seed": whole(0, 2**31 - 1),
    },
    "secure_aggregation": {
        "min_silos": whole(3, 255),
        "threshold": {"malicious", "honest_but_curious"},
        "colluding": whole(0, 255),
        "coordinate_clip": POSITIVE,
        "weights": {"masked", "equal", "public"},
        "public_weights": Maybe(lambda v: isinstance(v, dict) and all(re.fullmatch(NAME, name) for name in v)),
        "max_weight": whole(1, (2**29 - 1) // 3),
        "verify_sum": {"auto", "always", "never"},
    },
    "privacy": Maybe(
        {
            "unit": UNIT,
            "sample_rate": real(0, 1, above=True),
            "steps_per_round": whole(1, 100_000),
            "noise_multiplier": Maybe(real(1e-3, 10_000)),
            "target_epsilon": Maybe(real(0, 1000, above=True)),
            "max_grad_norm": POSITIVE,
            "update_divisor": POSITIVE,
            "delta": real(0, 0.01, above=True),
            "max_retrains": whole(0, 10_000),
            "accuracy": Absent({"data": TEXT, "without_noise": is_shares, "with_noise": is_shares}),
        }
    ),
    "deadlines": dict.fromkeys(("join", "share", "upload", "agree", "unmask"), whole(1)),
    "initial": Maybe(TEXT),
    **dict.fromkeys(("purpose", "contact", "retention"), Absent(TEXT)),
}
LOCK = {
    "version": whole(1, 1),
    "plan": HEX32,
    "encoder": lambda v: check_form(v, ENCODERS[v["kind"]], "lock.encoder") is None,
    "layout": Many({"name": TEXT, "shape": Many(whole(-(2**53)))}),
    "initial_model": HEX32,
    "initial_file": HEX32,
    "method_state": lambda v: isinstance(v, dict),
    "noise_multiplier": Maybe(NOISE),
    "releases": whole(1),
}
LIMIT = {"epsilon": POSITIVE, "delta": is_fraction}
ENTRY = {"version": whole(1, 2), "number": whole(1), "previous": HEX32, "at": whole(0), "silo": NAME, "key": HEX32}
STEP = {"noise_multiplier": NOISE, "sample_rate": real(0, 1, above=True)}
NEWER = ENTRY | {"version": whole(2, 2)}
NORMALISED = [[], ["casefold"], ["strip_zeros"], ["casefold", "strip_zeros"]]
ENTRIES = {
    "begin": ENTRY
    | STEP
    | {
        "kind": {"begin"},
        "run": HEX16,
        "federation": NAME,
        "plan": HEX32,
        "roster": HEX32,
        "unit": UNIT,
        "set": HEX16,
        "steps_per_round": whole(1),
        "releases": whole(1),
        "rounds": whole(1),
        "max_retrains": whole(0),
        "max_grad_norm": POSITIVE,
        "update_divisor": POSITIVE,
        "delta": is_fraction,
        "features": {"computed here", "stated to be per record"},
    },
    "data": ENTRY | {"kind": {"data"}, "run": HEX16, "set": HEX16},
    "reserve": ENTRY
    | STEP
    | {
        "kind": {"reserve"},
        "run": HEX16,
        "round": whole(1),
        "retrain": whole(0),
        "mechanism": {"poisson_gaussian"},
        "steps": whole(1),
        "set": HEX16,
    },
    "settle": ENTRY | {"kind": {"settle"}, "reservation": HEX32},
    "code": NEWER | {"kind": {"code"}, "run": HEX16, "code": HEX32},
    "limit": NEWER | {"kind": {"limit"}, "run": HEX16, "limit": Maybe(LIMIT)},
    "end": NEWER | {"kind": {"end"}, "run": HEX16},
    "clock": NEWER | {"kind": {"clock"}},
}
BEGIN_2 = ENTRIES["begin"] | {
    "code": HEX32,
    "patients": lambda v: isinstance(v, list) and v in NORMALISED,
    "limit": Absent(Maybe(LIMIT)),
}


def form_of_entry(entry: Json) -> Any:
    """By kind and version."""
    if entry.get("kind") == "begin" and entry.get("version") == 2:
        return BEGIN_2
    return ENTRIES.get(str(entry.get("kind")), {"kind": set(ENTRIES)})


NOTE = {"id": NAME, "text": WORDS, "because": WORDS}
ESTIMATE = {"library": PLAIN, "epsilon": EPSILON}
SPENT = {"trained": Many(whole(1)), "retrains": whole(0)}
COMMON = {
    "format": {"fedclip-privacy-report"},
    "version": whole(1, 2),
    "at": whole(0),
    "federation": NAME,
    "contract": {"digest": HEX32, "plan": PLAN, "lock": LOCK},
    "roster": {"digest": HEX32, "members": Many({"name": MEMBER, "key": HEX32}, 256)},
    "models": Many({"round": whole(1), "digest": HEX32}),
    "versions": lambda v: (
        isinstance(v, dict)
        and len(v) <= 100
        and all(isinstance(text, str) and re.fullmatch(PLAIN, text) for text in [*v, *v.values()])
    ),
    "not_covered": Many(NOTE),
}
SILO = COMMON | {
    "kind": {"silo"},
    "silo": NAME,
    "units_at_least": Maybe(whole(1)),
    "limit": Maybe(LIMIT),
    "ledger": Maybe(
        {
            "entries": Many({"entry": lambda v: isinstance(v, dict), "signature": HEX64}, 1_000_000),
            "uploaded": Many(whole(1)),
            "receipts": Many(WIRE),
        }
    ),
    "audit": Maybe(
        {
            "at": Absent(lambda v: whole(0)(v) and v % HOUR == 0),
            "code": Absent(HEX32),
            "received": Absent(HEX32),
            "self_tests": Many({"name": set(TESTS), "passed": BOOLEAN, "shows": PLAIN}, 100),
            "attack": Maybe(
                dict.fromkeys(("canaries", "guesses", "right"), whole(0))
                | {
                    "confidence": PROBABILITY,
                    "epsilon_at_least": EPSILON,
                    "curve": Many({"false_positives": PROBABILITY, "true_positives": PROBABILITY}, 200),
                }
            ),
        }
    ),
    "claim": Maybe(
        {
            "sentence": WORDS,
            "unit": UNIT,
            "epsilon": EPSILON,
            "delta": PROBABILITY,
            "replace_one": EPSILON,
            "groups": Many({"units": whole(1), "epsilon": Maybe(EPSILON)}),
            "spent": SPENT | {"reservations": whole(0), "epsilon": EPSILON, "replace_one": EPSILON},
        }
    ),
    "scope": Many(
        {"id": NAME, "what": WORDS, "status": {"accounted", "public", "unprotected"}, "because": WORDS},
    ),
    "trust": Many(NOTE),
    "assumptions": Many(NOTE | {"state": {"shown", "said", "stated", "open", "tested"}}),
    "mechanism": Maybe(
        {
            "method": TEXT,
            "name": WORDS,
            "unit": UNIT,
            "max_grad_norm": real(),
            "noise_multiplier": real(),
            "sample_rate": PROBABILITY,
            **dict.fromkeys(("steps_per_round", "releases", "rounds", "max_retrains"), whole(0)),
            "update_divisor": real(),
            "loss": Maybe(TEXT),
            "notes": Many(WORDS),
        }
    ),
    "accounting": Maybe(
        {"library": PLAIN, "pld": EPSILON, "rdp": EPSILON, "prv": Maybe(ESTIMATE), "agree": Maybe(BOOLEAN)}
    ),
    "lifetime": Maybe(
        {
            "runs": whole(0),
            "limit": LIMIT,
            "order": whole(2),
            "budget": real(),
            "this_run": real(),
            "every_run": real(),
            "sentence": WORDS,
        }
    ),
}
SIGNATURE = {"silo": MEMBER, "key": HEX32, "value": HEX64}
FEDERATION = COMMON | {
    "kind": {"federation"},
    "planned_rounds": whole(1),
    "receipts": Many(WIRE),
    "claim": Maybe({"sentence": WORDS, "delta": PROBABILITY, "worst_silo": EPSILON, "all_silos": Maybe(EPSILON)}),
    "silos": Many(
        SPENT | {"silo": NAME, "reported": BOOLEAN, "epsilon": Maybe(EPSILON), "replace_one": Maybe(EPSILON)}, 255
    ),
    "reports": Many({"body": SILO, "signature": SIGNATURE}, 255),
}


def check_report_form(report: Json) -> None:
    """The whole file, and what a plan and an attack can be."""
    kind = report["body"]["kind"]
    check_form(report, {"body": {"silo": SILO, "federation": FEDERATION}[kind], "signature": SIGNATURE}, "report")
    for body in [report["body"], *(inner["body"] for inner in report["body"].get("reports", ()))]:
        check_plan(body["contract"]["plan"])
        attack = (body.get("audit") or {"attack": None})["attack"]
        possible = attack is None or attack["right"] <= attack["guesses"] <= attack["canaries"]
        need(possible, "the attack has more right guesses than guesses, or more of these than canaries")


def check_plan(plan: Json) -> None:
    """What its values have to do with each other."""
    folders, splits, privacy = [pair[0] for pair in plan["classes"]], plan["splits"], plan["privacy"]
    need(len(folders) >= 2 and len(set(folders)) == len(folders), "the plan has too few classes, or one twice")
    for folder, phrase in plan["classes"]:
        check_form(folder, rf"(?!\.)[^/\\{CONTROL}]{{1,200}}", "plan.classes")
        check_form(phrase, TEXT, "plan.classes")
    once = all(template.count("{}") == 1 for template in plan["templates"])
    need(bool(plan["templates"]) and once, "a template does not hold {} once")
    parts = splits["train"], splits["validation"], splits["test"]
    need(max(parts[1:]) < 1 and math.isclose(math.fsum(parts), 1.0, abs_tol=1e-9), "the splits do not add up")
    masks = plan["secure_aggregation"]
    weights = (masks["public_weights"] or {}).values()
    given = all(type(weight) is int and 1 <= weight <= masks["max_weight"] for weight in weights)
    need(given and (masks["weights"] == "public") == (masks["public_weights"] is not None), "the weights do not fit")
    server = urlsplit(plan["server"])
    host = server.scheme == "https" and bool(server.hostname) and server.port != 0 and "@" not in server.netloc
    need(host and not (server.path or server.query or server.fragment), "the server is no https://HOST")
    if privacy is None:
        need(plan["training"]["batch_size"] is not None, "a plan without privacy has no batch size")
        return
    need((privacy["noise_multiplier"] is None) != (privacy["target_epsilon"] is None), "noise or target: one of them")
    training = plan["training"]
    plain = splits["validation"] > 0 or masks["weights"] == "masked" or training["local_epochs"] != 1
    need(not plain and training["batch_size"] is None, "the plan's privacy does not go with its other values")
    if (accuracy := privacy.get("accuracy")) is not None:
        each = all(set(accuracy[key]) == set(folders) for key in ("without_noise", "with_noise"))
        need(each, "the plan's accuracies are not of its classes")


# Arithmetic


class Event(NamedTuple):
    """So many steps of the Poisson-sampled Gaussian mechanism."""

    sigma: float
    rate: float
    steps: int


Mixture = tuple[Any, Any]  # places (n, 1) of normal distributions of deviation 1, and logarithms of their weights


@lru_cache(maxsize=256)
def epsilon(event: Event, delta: float, size: int = 1, *, replace: bool = False) -> float:
    """Epsilon by PLD; `size` units of one person, or one replaced by another.

    On finer and finer grids, each of which gives an upper bound, until it hardly falls or the next would be too large.
    """
    if event.steps == 0:
        return 0.0
    need(event.steps <= MOST_STEPS, f"more than {MOST_STEPS} steps cannot be accounted for")
    need(delta >= max(1e-12, 2e-14 + 2e-15 * event.steps), "delta drowns in the rounding errors of so many steps")
    best, losses = math.inf, [Loss(*pair) for pair in _pairs(event, size, replace=replace)]
    for points in GRIDS:
        pmfs = [loss.on_grid(points).self_compose(event.steps) for loss in losses]
        with np.errstate(over="ignore"):
            found = max(float(pmf.get_epsilon_for_delta(delta)) for pmf in pmfs)
        fallen, best = best - found, min(best, found)
        if fallen < 1e-4 * max(1.0, best) or 4 * sum(pmf.size for pmf in pmfs) > MOST_POINTS:
            break
    return best


def _pairs(event: Event, size: int, *, replace: bool) -> Iterator[tuple[Mixture, Mixture]]:
    """What an attacker has to tell apart in one step: Binomial(size, rate) units, each at distance 1/sigma."""
    numbers = np.arange(size + 1)[:, None]
    weights = np.maximum(binom.logpmf(numbers, size, event.rate), -700.0)
    with_units, without = (numbers / event.sigma, weights), (np.zeros((1, 1)), np.zeros((1, 1)))
    mirrored = (-numbers / event.sigma, weights)
    if replace:
        yield with_units, mirrored
        return
    yield with_units, without
    yield without, mirrored


class Loss:
    """The privacy loss of one step: of `upper` against `lower`, rising with the outcome."""

    def __init__(self, upper: Mixture, lower: Mixture) -> None:
        self.upper, self.lower = upper, lower
        ends = np.linspace(-40 + upper[0].min(), 40 + upper[0].max(), 20_001)
        likely = ends[np.minimum(_above(upper, ends), _above((-upper[0], upper[1]), -ends)) > -50]
        self.x = np.linspace(likely.min(), likely.max(), 100_001)
        self.loss = _density(upper, self.x) - _density(lower, self.x)
        self.width = float(self.loss[-1] - self.loss[0])
        need(0 < self.width < 1e5, "the noise hides nothing, or everything")

    def on_grid(self, points: int) -> Any:
        """Its distribution on so many points, rounded so that no divergence shrinks."""
        gap = self.width / points
        grid = np.arange(math.floor(self.loss[0] / gap), math.ceil(self.loss[-1] / gap) + 1)
        cut = np.interp(grid * gap, self.loss, self.x)
        deltas = np.exp(_above(self.upper, cut)) - np.exp(grid * gap + _above(self.lower, cut))
        deltas = np.maximum.accumulate(np.clip(deltas, 0, 1)[::-1])[::-1]
        pmf = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(gap, int(grid[0]), int(grid[-1]), deltas)
        return pmf.to_dense_pmf()


def _density(mixture: Mixture, x: Any) -> Any:
    places, weights = mixture
    return logsumexp(weights + places * (x - places / 2), axis=0)  # over that of the normal distribution at 0


def _above(mixture: Mixture, x: Any) -> Any:
    places, weights = mixture
    return logsumexp(weights + log_ndtr(places - x), axis=0)


def rdp(event: Event, delta: float) -> float:
    """Epsilon by RDP, best over whole orders (Canonne, Kamath & Steinke 2020, Proposition 12)."""

    def at(order: int) -> float:
        spent = event.steps * rdp_at(event.sigma, event.rate, order)
        return spent + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)

    return max(0.0, min(at(order) for order in WHOLE_ORDERS))


def rdp_at(sigma: float, rate: float, order: int) -> float:
    """One step at a whole order (Mironov, Talwar & Zhang 2019)."""
    j = np.arange(order + 1)
    terms = binom.logpmf(j, order, rate) + j * (j - 1) / (2 * sigma**2)
    return max(0.0, float(logsumexp(terms))) / (order - 1)


def at_least(given: float | None, least: float, what: str) -> None:
    """Refuse a figure that is too low; null stands above all numbers."""
    low = given is not None and given < least - SLACK * max(1.0, least)
    need(not low, f"{what} is given as {given}, but is {least:.4f}")


# Parts of a report


def check_agreed(body: Json) -> None:
    """The fingerprints of plan and roster."""
    plan, lock, members = body["contract"]["plan"], body["contract"]["lock"], body["roster"]["members"]
    need(cbor_hash(["fedclip/v1/contract", plan, lock]) == body["contract"]["digest"], "another plan or lock")
    need(cbor_hash(["fedclip/v1/plan", plan]) == lock["plan"], "the lock belongs to another plan")
    need(plan["federation"] == body["federation"], "the plan is of another federation")
    pairs = [[member["name"], hashlib.sha256(spki(member["key"])).digest()] for member in members]
    need(cbor_hash(pairs) == body["roster"]["digest"], "the keys are others than the fingerprint of the roster says")
    names, keys = [member["name"] for member in members], {member["key"] for member in members}
    need(names == sorted(set(names)) and "aggregator" in names, "the roster is not in order")
    need(len(keys) == len(names) >= 4, "the roster has fewer than 3 silos, or a key twice")


def check_models(body: Json) -> None:
    """Of rounds of the plan, in order."""
    rounds, most = [model["round"] for model in body["models"]], body["contract"]["plan"]["training"]["rounds"]
    need(rounds == sorted(set(rounds)) and max(rounds, default=0) <= most, "the models are not of rounds in order")


def spki(key: str) -> bytes:
    """The DER form that the roster's fingerprint is over."""
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )


def key_of(body: Json, name: str) -> str:
    """A member's key."""
    keys = {member["name"]: member["key"] for member in body["roster"]["members"]}
    need(name in keys, f"{name} is not in the roster")
    return str(keys[name])


def check_signature(report: Json) -> None:
    """Signed by the key that the roster has for whoever the report is of."""
    body, signature = report["body"], report["signature"]
    signer = "aggregator" if body["kind"] == "federation" else body["silo"]
    key = key_of(body, signer)
    named = (signature["silo"], signature["key"]) == (signer, key)
    need(named, f"it is not signed in the name and by the key of {signer}")
    data = LABELS["privacy-report"] + canonical(body)
    need(signed_by(key, signature["value"], data), f"the signature is not by {signer}: the report was edited")


class Ledger:
    """A chain that is checked from its first entry on, all runs in it included."""

    def __init__(self, body: Json) -> None:
        self.entries: list[Json] = []
        self.place: dict[str, int] = {}
        self.runs: dict[str, Run] = {}
        self.run_of: dict[str, Run] = {}  # by hash of the reservation
        self.sets: set[str] = set()
        self.known: set[tuple[str, str, str]] = set()  # silo, plan and roster of runs
        previous = "0" * 64
        for number, item in enumerate(body["ledger"]["entries"], 1):
            entry, where = item["entry"], f"entry {number}"
            check_form(entry, form_of_entry(entry), where)
            data = LABELS["ledger-entry"] + canonical(entry)
            follows = (entry["number"], entry["previous"]) == (number, previous)
            need(follows, f"{where} does not follow the one before it")
            before = self.entries[-1] if self.entries else entry
            need(entry["version"] >= before["version"], f"{where} is of an older version than the one before it")
            behind = entry["at"] < before["at"]  # only a clock that was set right may be
            need(behind == (entry["kind"] == "clock"), f"{where} and the one before it are not in the order of times")
            need(signed_by(entry["key"], item["signature"], data), f"{where} is not signed by its key")
            previous = hashlib.sha256(data).hexdigest()
            self._take(entry, previous, where)
            self.place[previous] = number
            self.entries.append(entry)
        newest = max((entry["version"] for entry in self.entries), default=1)
        need(body["version"] >= newest, "the ledger has entries of a newer version than the report")
        wanted = body["silo"], body["contract"]["digest"], body["roster"]["digest"]
        self.run = next((run for run in self.runs.values() if run.of == wanted), None)
        self.begin = self.run.begin if self.run else None
        self.reserved = self.run.reserved if self.run else {}
        self.settled = self.run.settled if self.run else {}

    def _take(self, entry: Json, digest: str, where: str) -> None:
        if entry["kind"] == "clock":
            return
        if entry["kind"] == "begin":
            self._begin(entry, where)
            return
        found = self.run_of.get(entry["reservation"]) if "reservation" in entry else self.runs.get(entry["run"])
        if found is None:
            raise WrongError(f"{where} is about a run or a reservation that is not here")
        same = (entry["silo"], entry["key"]) == (found.begin["silo"], found.begin["key"])
        need(same, f"{where} is about a run that another silo or key began")
        if entry["kind"] == "settle":
            need(entry["reservation"] not in found.settled, f"{where} settles what was settled before")
            found.settled[entry["reservation"]] = entry["number"]
            return
        need(not found.ended, f"{where} is about a run that was ended")
        if entry["kind"] == "data":
            self._new_set(entry, where)
            found.set = entry["set"]
        elif entry["kind"] == "code":
            need(found.codes[-1:] != [entry["code"]], f"{where} notes the program that its run has already")
            found.codes.append(entry["code"])
        elif entry["kind"] == "limit":
            need(found.limits[-1:] != [entry["limit"]], f"{where} notes the limit that its run has already")
            found.limits.append(entry["limit"])
        elif entry["kind"] == "end":
            found.ended = True
        else:
            found.reserve(entry, digest, where)
            self.run_of[digest] = found

    def _begin(self, entry: Json, where: str) -> None:
        run = Run(entry)
        new = entry["run"] not in self.runs and run.of not in self.known
        need(new, f"{where} begins a run that was begun before")
        self.known.add(run.of)
        first = next(iter(self.runs.values())).begin if self.runs else entry  # all others are as this one
        need(first["unit"] == entry["unit"], f"{where} charges another unit than those before it")
        named = entry.get("patients", [])
        need(entry["unit"] == "patient" or not named, f"{where} names patients where the unit is a record")
        need(first.get("patients", []) == named, f"{where} normalises patients in another way than those before it")
        self._new_set(entry, where)
        self.runs[entry["run"]] = run

    def _new_set(self, entry: Json, where: str) -> None:
        need(entry["set"] not in self.sets, f"{where} gives the name of a set of units to another one")
        self.sets.add(entry["set"])

    @property
    def codes(self) -> list[str]:
        """Hashes of the code that trained; none where the entry that began the run has none."""
        if self.begin is None or "code" not in self.begin:
            return []
        return [entry["code"] for entry in self.entries if entry.get("run") == self.begin["run"] and "code" in entry]

    @property
    def trained(self) -> list[int]:
        """Rounds that were settled."""
        return sorted({self.reserved[digest]["round"] for digest in self.settled})


class Run:
    """What a ledger says of one run."""

    def __init__(self, begin: Json) -> None:
        self.begin, self.set, self.ended = begin, begin["set"], False
        self.codes: list[str] = [begin["code"]] if "code" in begin else []  # of the programs that were to train it
        self.limits: list[Json] = [begin["limit"]] if "limit" in begin else []  # that it was held to
        self.of = begin["silo"], begin["plan"], begin["roster"]
        self.reserved: dict[str, Json] = {}
        self.settled: dict[str, int] = {}  # reservation: number of the entry
        self.rounds: set[int] = set()  # that were ever reserved

    def reserve(self, entry: Json, digest: str, where: str) -> None:
        """Take one more charge, if it keeps to the terms of the run."""
        begin = self.begin
        self.rounds.add(entry["round"])
        steps = begin["steps_per_round"] * begin["releases"]
        event = entry["noise_multiplier"], entry["sample_rate"], entry["steps"], entry["set"]
        same = event == (begin["noise_multiplier"], begin["sample_rate"], steps, self.set)
        need(entry["version"] == 1 or bool(self.codes), f"{where} does not say which program trains")
        need(same and entry["round"] <= begin["rounds"], f"{where} reserves something else than its run began with")
        retrains = len(self.reserved) + 1 - len(self.rounds)
        need(entry["retrain"] == retrains <= begin["max_retrains"], f"{where} miscounts the retrains, or has too many")
        self.reserved[digest] = entry


def sigma_of(body: Json) -> float:
    """The noise of a plan with privacy."""
    return float(body["contract"]["lock"]["noise_multiplier"])


def per_round(body: Json) -> int:
    """Steps that one round charges."""
    contract = body["contract"]
    method, locked = contract["plan"]["method"], contract["lock"]["releases"]
    need(method["loss"] == "cross_entropy", "the loss is not known to be of one record alone")
    released = RELEASES.get(method["name"])
    need(released is not None, f"what a step of {method['name']} releases is unknown; use a newer verify_report.py")
    fact = f"the lock says that a step of {method['name']} releases {locked} noisy sum(s), and it releases {released}"
    need(locked == released, fact)
    return int(contract["plan"]["privacy"]["steps_per_round"] * contract["lock"]["releases"])


def rounds_of(body: Json) -> int:
    """Rounds that the plan allows, retrains included."""
    plan = body["contract"]["plan"]
    return int(plan["training"]["rounds"] + plan["privacy"]["max_retrains"])


def charge(body: Json, rounds: int) -> Event:
    """What so many rounds of the plan come to."""
    return Event(sigma_of(body), body["contract"]["plan"]["privacy"]["sample_rate"], per_round(body) * rounds)


def check_run(body: Json, ledger: Ledger) -> None:
    """Entries of this run against the plan."""
    plan, begin = body["contract"]["plan"], ledger.begin
    need(not ledger.entries or ledger.entries[-1]["at"] <= body["at"], "the ledger is younger than the report")
    if begin is None:
        return
    privacy, key = plan["privacy"], key_of(body, body["silo"])
    same = ("unit", "sample_rate", "steps_per_round", "max_retrains", "max_grad_norm", "update_divisor", "delta")
    wanted = {name: privacy[name] for name in same} | {
        "key": key,
        "federation": plan["federation"],
        "noise_multiplier": sigma_of(body),
        "releases": body["contract"]["lock"]["releases"],
        "rounds": plan["training"]["rounds"],
    }
    for name, value in wanted.items():
        need(begin[name] == value, f"the ledger began this run with {name} {begin[name]}, the plan has {value}")


RECEIPT = {
    "v": whole(1, 1),
    **dict.fromkeys(("plan", "roster", "head"), lambda v: isinstance(v, bytes) and len(v) == 32),
    "silo": MEMBER,
    **dict.fromkeys(("round", "attempt"), whole(1, 2**31 - 1)),
}


def open_receipt(wire: bytes, body: Json) -> Json:
    """A receipt that the coordinator signed for this run: canonical CBOR of [body, signature]."""
    signature = wire[-64:]
    bodies = [wire[start:-66] for start in (3, 4)]  # after the head of an array of two and of a byte string
    data = next((data for data in bodies if cbor2.dumps([data, signature], canonical=True) == wire), None)
    signed = data is not None and signed_by(key_of(body, "aggregator"), signature.hex(), LABELS["receipt"] + data)
    if data is None or not signed:
        raise WrongError("a receipt is not signed by the coordinator")
    receipt = cbor2.loads(data)
    check_form(receipt, RECEIPT, "a receipt")
    need(cbor2.dumps(receipt, canonical=True) == data, "a receipt is not in the one form that is signed")
    of = receipt["plan"].hex(), receipt["roster"].hex()
    name = f"the receipt of {receipt['silo']} in round {receipt['round']}"
    need(of == (body["contract"]["digest"], body["roster"]["digest"]), f"{name} is of another run")
    return receipt


def check_receipt(wire: bytes, body: Json, ledger: Ledger) -> tuple[int, int, int]:
    """(attempt, round, place in the ledger) of a receipt that fits."""
    receipt = open_receipt(wire, body)
    name = f"the receipt of round {receipt['round']}"
    need(receipt["silo"] == body["silo"], f"{name} is of {receipt['silo']}")
    place = ledger.place.get(receipt["head"].hex())
    if place is None:
        raise WrongError(f"{name} is for a state that this ledger never had")
    mine = [n for digest, n in ledger.settled.items() if ledger.reserved[digest]["round"] == receipt["round"]]
    need(bool(mine) and min(mine) <= place, f"{name} is for a state before that round was trained")
    return receipt["attempt"], receipt["round"], place


def check_receipts(body: Json, ledger: Ledger, held: Sequence[bytes]) -> None:
    """Receipts in the report, and those that the coordinator's report holds."""
    for wire in held:
        check_receipt(wire, body, ledger)
    found = [check_receipt(bytes.fromhex(wire), body, ledger) for wire in body["ledger"]["receipts"]]
    need([item[0] for item in found] == sorted({item[0] for item in found}), "the receipts are not in order")
    need([item[1:] for item in found] == sorted(item[1:] for item in found), "a later round has an older state")
    rounds = sorted({item[1] for item in found})
    need(rounds == body["ledger"]["uploaded"], f"receipts are of rounds {rounds}, not of {body['ledger']['uploaded']}")


def check_figures(body: Json, ledger: Ledger) -> None:
    """Every figure against a new computation."""
    privacy, claim, given = body["contract"]["plan"]["privacy"], body["claim"], body["accounting"]
    need(claim is not None and given is not None, "a plan with privacy, and no claim")
    delta, total = privacy["delta"], charge(body, rounds_of(body))
    need((claim["unit"], claim["delta"]) == (privacy["unit"], delta), "unit or delta are not the plan's")
    need(rdp(total, delta) <= 1000, "the noise is too small for any claim")
    at_least(given["pld"], epsilon(total, delta), "epsilon by PLD")
    at_least(given["rdp"], max(given["pld"], rdp(total, delta)), "epsilon by RDP")
    larger = given["pld"]
    need((given["agree"] is None) == (given["prv"] is None), "whether the accountants agree is said wrongly")
    if given["prv"] is not None:
        agree = abs(given["pld"] - given["prv"]["epsilon"]) <= max(0.02, 0.005 * given["pld"])
        need(given["agree"] is agree, "whether the accountants agree is said wrongly")
        larger = larger if agree else max(larger, given["prv"]["epsilon"])
    need(claim["epsilon"] >= larger, "the claim is lower than its own accounting")
    at_least(claim["replace_one"], epsilon(total, delta, replace=True), "epsilon for replace-one")
    need([group["units"] for group in claim["groups"]] == GROUPS, "groups are left out")
    need(claim["groups"][0]["epsilon"] == claim["epsilon"], "epsilon for 1 unit is another than that of the claim")
    check_audit(body)
    for group in claim["groups"]:
        if group["epsilon"] is None:  # so much that no number expresses it
            continue
        least = epsilon(total, delta, group["units"])
        at_least(group["epsilon"], least, f"epsilon for {group['units']} units")
    spent, charged = claim["spent"], len(ledger.reserved)
    retrains = charged - len({entry["round"] for entry in ledger.reserved.values()})
    said = spent["reservations"], spent["trained"], spent["retrains"]
    need(said == (charged, ledger.trained, retrains), "what was spent is not what the ledger says")
    at_least(spent["epsilon"], epsilon(charge(body, charged), delta), "epsilon spent until now")
    at_least(spent["replace_one"], epsilon(charge(body, charged), delta, replace=True), "the same for replace-one")
    check_lifetime(body, ledger)


def check_lifetime(body: Json, ledger: Ledger) -> None:
    """RDP at the order of the limit."""
    life, limit = body["lifetime"], body["limit"]
    need((life is None) == (limit is None), "a limit and what is said of it go together")
    if life is None:
        return
    rate, sigma, order = body["contract"]["plan"]["privacy"]["sample_rate"], sigma_of(body), life["order"]

    def budget(at: int) -> float:
        return limit["epsilon"] - math.log1p(-1 / at) + math.log(limit["delta"] * at) / (at - 1)

    best = max(range(2, 1025), key=lambda at: budget(at) / at)
    right = order == best and math.isclose(life["budget"], budget(best), rel_tol=1e-6) and budget(best) > 0
    need(right, "the limit's order or budget is wrong")
    this_run = per_round(body) * rounds_of(body) * rdp_at(sigma, rate, order)
    more = 0 if ledger.run and ledger.run.ended else max(0, rounds_of(body) - len(ledger.reserved))
    left = more * per_round(body) * rdp_at(sigma, rate, order)
    every = [entry for entry in ledger.entries if entry["kind"] == "reserve"]
    every_run = left + sum(e["steps"] * rdp_at(e["noise_multiplier"], e["sample_rate"], order) for e in every)
    need(math.isclose(life["this_run"], this_run, rel_tol=1e-6), "what this run takes of the limit is wrong")
    need(math.isclose(life["every_run"], every_run, rel_tol=1e-6), "what all runs take of the limit is wrong")
    fits = life["this_run"] <= life["budget"] * (1 + 1e-9)
    need(fits or body["version"] > 1, "the whole run does not fit the limit, and version 1 cannot say so")
    need((life["limit"], life["runs"]) == (limit, len(ledger.runs)), "the lifetime is of another limit or ledger")


def check_audit(body: Json) -> None:
    """No attack proves more than is claimed, unless a test failed, which is shown."""
    audit = body["audit"]
    if audit is None or audit["attack"] is None:
        return
    attack, proven = audit["attack"], audit["attack"]["epsilon_at_least"]
    if body["version"] > 1:
        need(attack["canaries"] <= MOST_CANARIES, "an attack has more canaries than any audit")
        need(attack["confidence"] == 0.95, "what an attack proves is said with another confidence than 0.95")
        least = proven_by(attack, body["claim"]["delta"])
        need(abs(proven - least) <= SLACK, f"the guesses prove an epsilon of {least:.4f}, and {proven} is given")
    passed = all(test["passed"] for test in audit["self_tests"])
    fact = f"an attack is said to prove an epsilon of {proven}, above the claim"
    need(proven <= body["claim"]["epsilon"] or not passed, fact)


def proven_by(attack: Json, delta: float) -> float:
    """The largest epsilon that so many right guesses refute (Steinke, Nasr & Jagielski 2023, theorem 5.2)."""
    right, guesses, error = attack["right"], attack["guesses"], 1 - attack["confidence"]
    if right == 0:
        return 0.0
    more = np.arange(1, right + 1)

    def refuted(epsilon: float) -> bool:
        chance = 1 / (1 + math.exp(-epsilon))
        below = np.cumsum(binom.pmf(right - more, guesses, chance)) / more
        return bool(binom.sf(right - 1, guesses, chance) + 2 * attack["canaries"] * delta * below.max() < error)

    least, most = 0.0, 512.0
    if refuted(most):
        return most
    while most - least > SLACK / 8:
        middle = (least + most) / 2
        least, most = (middle, most) if refuted(middle) else (least, middle)
    return least


def check_audit_form(body: Json) -> None:
    """Version 1 had neither its hour nor its code; it is no younger than the report."""
    audit = body["audit"] or {}
    need(
        body["version"] > 1 or not set(audit) & {"at", "code", "received"},
        "version 1 does not say when and on what code",
    )
    need(audit.get("at", 0) <= body["at"], "the audit is younger than the report")


def check_texts(body: Json, ledger: Ledger | None) -> None:
    """Which texts there must be, by id, and that each is the known one."""
    wanted = {
        "scope": scope_ids(body),
        "not_covered": not_covered_ids(body),
        "trust": trust_ids(body),
        "assumptions": assumption_ids(body, ledger),
    }
    for part, ids in wanted.items():
        check_part(body, part, ids)
    claim, life = body["claim"], body["lifetime"]
    if claim is not None:
        values = {"silo": body["silo"], "federation": body["federation"], "times": times(claim["epsilon"])}
        check_sentence("claim", claim, epsilon=claim["epsilon"], unit=claim["unit"], delta=claim["delta"], **values)
    if life is not None:
        changed = ledger is not None and bound_id(body, ledger) in {"limit-raised", "limit-below-run", "limit-lowered"}
        check_sentence("changed limit" if changed else "lifetime", life, unit=claim["unit"], **life["limit"])


def check_part(body: Json, part: str, ids: list[str]) -> None:
    """One list of texts."""
    found = [item["id"] for item in body[part]]
    need(found == ids, f"{part} has {found}, the plan and the facts give {ids}")
    for item in body[part]:
        need(TEXTS.get(f"{part}/{item['id']}") == text_hash(item), f"the text {part}/{item['id']} was changed")


def check_sentence(name: str, part: Json, *, delta: float, **values: Any) -> None:
    """It is the known one, with these values."""
    wanted = SENTENCES[name].format(delta=small(delta), **values)
    need(part["sentence"] == wanted, f"the sentence of the {name} says something else than its figures")


def times(value: float) -> str:
    """e to the power of it, rounded up."""
    if math.exp(min(value, 20)) >= 1e6:
        return f"10{str(math.ceil(value / math.log(10))).translate(RAISED)}"
    digits = max(0, 2 - math.floor(math.log10(math.exp(value))))
    return f"{math.ceil(math.exp(value) * 10**digits) / 10**digits:,.{digits}f}"


def small(value: float) -> str:
    """A probability with a power of ten."""
    digits, _, power = f"{value:.3g}".partition("e")
    raised = f"10{str(int(power)).translate(RAISED)}" if power else digits
    return raised if digits == "1" or not power else f"{digits}·{raised}"


RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def scope_ids(body: Json) -> list[str]:
    """What leaves a silo."""
    plan = body["contract"]["plan"]
    always = ["protocol", "identity", "presence", "timing", "logs", "results"]
    if plan["privacy"]:
        return ["update", "weight", "ledger", "bound", *always]
    weight = "weight-masked" if plan["secure_aggregation"]["weights"] == "masked" else "weight"
    counts = ["counts"] if plan["splits"]["validation"] > 0 else []
    return ["update-plain", weight, *counts, *always]


def not_covered_ids(body: Json) -> list[str]:
    """What no claim reaches."""
    private = ["knowledge", "several", "copies", "elsewhere"]
    return [*(private if body["contract"]["plan"]["privacy"] else ["no-privacy"]), "choices", "trials"]


def trust_ids(body: Json) -> list[str]:
    """Who can see what."""
    plan = body["contract"]["plan"]
    weak = plan["secure_aggregation"]["threshold"] == "honest_but_curious"
    last = "fallback" if plan["privacy"] else "no-fallback"
    return ["single", "threshold-weak" if weak else "threshold", "sum", "local-machine", last]


def assumption_ids(body: Json, ledger: Ledger | None) -> list[str]:
    """What the claim rests on; the id says in which state."""
    privacy = body["contract"]["plan"]["privacy"]
    first = body["version"] == 1
    if privacy is None or ledger is None:
        return ["masks", "sums", "code" if first else "code-of-report"]
    second = {True: "second-accountant", False: "second-accountant-differs", None: "second-accountant-none"}
    recorded = ledger.begin is not None and ledger.begin["version"] > 1
    here = "features" if first else "features-apart" if recorded else "features-in-batches"
    features = {"computed here": here, "stated to be per record": "features-external", None: "features-none"}
    return [
        "alone",
        "arithmetic",
        second[body["accounting"]["agree"]],
        "ledger" if body["ledger"]["receipts"] else "ledger-unreceipted",
        "second-ledger",
        *(["clock"] if any(entry["kind"] == "clock" for entry in ledger.entries) else []),
        *tests_and_code_ids(body, ledger),
        "floating-point",
        features[ledger.begin["features"] if ledger.begin else None],
        f"units-{privacy['unit']}",
        "delta",
        bound_id(body, ledger),
    ]


def bound_id(body: Json, ledger: Ledger) -> str:
    """What holds over all runs, by the limits that the silo held them to."""
    life, today = body["lifetime"], body["limit"]
    mine = [entry["limit"] for entry in ledger.entries if entry["silo"] == body["silo"] and "limit" in entry]
    if life is None:
        return "limit-removed" if any(mine) else "no-limit"
    fits = life["every_run"] <= life["budget"]
    if body["version"] == 1:
        return "all-runs-fit" if fits else "limit-kept"
    pairs = [(math.inf, 1.0) if limit is None else (limit["epsilon"], limit["delta"]) for limit in [*mine, today]]
    runs = ledger.runs.values()
    found = {
        "limit-raised": any(new[0] > old[0] or new[1] > old[1] for old, new in pairwise(pairs)),
        "limit-below-run": life["this_run"] > life["budget"] * (1 + 1e-9),
        "limit-lowered": len(set(pairs)) > 1,
        "limit-unrecorded": not all("limit" in run.begin for run in runs),
        "nothing-spent": not runs,
        "runs-fit": fits and all(limit == today for run in runs for limit in run.limits),
    }
    return next((name for name, holds in found.items() if holds), "limit-kept")


def tests_and_code_ids(body: Json, ledger: Ledger) -> list[str]:
    """Which code trained, and what the silo says that it tested."""
    audit, codes = body["audit"], set(ledger.codes)
    tests = (audit or {"self_tests": []})["self_tests"]
    later = LATER_TESTS if audit is not None and "code" not in audit else set()
    every = [test["name"] for test in tests] == [name for name in TESTS if name not in later]
    passed = all(test["passed"] for test in tests)
    if body["version"] == 1:
        return ["code", "mechanism-failed" if not passed else "mechanism" if every else "mechanism-untested"]
    if ledger.begin is None:
        ran = "code-nothing-trained"
    else:
        ran = "code-unrecorded" if not codes else "code-one" if len(codes) == 1 else "code-changed"
    found = [ran, "mechanism-failed" if not passed else "mechanism-said" if every else "mechanism-unaudited"]
    if audit is None or ledger.begin is None or found[1] != "mechanism-said":
        return found
    known = bool(codes) and "code" in audit
    found.append(("audited-same" if codes == {audit["code"]} else "audited-other") if known else "audited-unknown")
    if "at" in audit and ledger.reserved:
        first = next(iter(ledger.reserved.values()))
        rounds = [model["round"] for model in body["models"] if model["digest"] == audit.get("received")]
        apart = 1 if max(rounds, default=0) >= first["round"] else audit["at"] - first["at"] // HOUR * HOUR
        found.append("audit-before" if apart < 0 else "audit-after" if apart > 0 else "audit-in-the-hour")
    return found


# Whole reports


def say(line: str) -> None:
    """Print in ASCII without control characters."""
    print("".join(char if " " <= char <= "~" else char.encode("unicode_escape").decode() for char in line))


class Printed:
    """Runs checks and prints each."""

    def __init__(self) -> None:
        self.failed = 0
        self.tests_failed: list[str] = []  # of the mechanism, as silos say of their own machines
        self.open: list[str] = []  # what reports say themselves that they leave open

    def check(self, name: str, function: Callable[[], Any]) -> Any:
        """The value, or None where the check failed."""
        try:
            value = function()
        except Exception as error:
            self.failed += 1
            known = isinstance(error, WrongError)
            fact = str(error) if known else f"cannot be checked ({type(error).__name__}: {error})"
            say(f"FAILED  {name}: {fact[:300]}")
            return None
        say(f"ok      {name}")
        return value if value is not None else True


def check_silo(out: Printed, report: Json, name: str, held: Sequence[bytes] = ()) -> None:
    """Every check of one silo's report."""
    body = report["body"]
    out.check(f"{name}plan and roster", lambda: check_agreed(body))
    out.check(f"{name}signature", lambda: check_signature(report))
    out.check(f"{name}models", lambda: check_models(body))
    out.check(f"{name}audit", lambda: check_audit_form(body))
    ledger = None
    if body["contract"]["plan"]["privacy"] is None:
        out.check(f"{name}no claim", lambda: check_nothing_claimed(body))
        out.check(f"{name}receipts", lambda: need(not held, "receipts are held for a plan without a ledger"))
    else:
        ledger = out.check(f"{name}ledger", lambda: Ledger(body))
        if ledger is None:
            return
        out.check(f"{name}run", lambda: check_run(body, ledger))
        out.check(f"{name}receipts", lambda: check_receipts(body, ledger, held))
        out.check(f"{name}mechanism", lambda: check_mechanism(body))
        out.check(f"{name}arithmetic", lambda: check_figures(body, ledger))
    out.check(f"{name}wording", lambda: check_texts(body, ledger))
    tests = (body["audit"] or {"self_tests": []})["self_tests"]
    out.tests_failed += [f"{test['name']} at {body['silo']}" for test in tests if not test["passed"]]
    if body["version"] == 1:
        out.open.append(f"{body['silo']}: {FIRST_VERSION}")
    left = [item for item in body["assumptions"] if item["state"] == "open"]
    out.open += [f"{body['silo']}: {item['text']}? {item['because']}" for item in left]


def check_nothing_claimed(body: Json) -> None:
    """A plan without privacy."""
    for part in ("claim", "ledger", "accounting", "lifetime", "mechanism"):
        need(body[part] is None, f"{part} is given for a plan without privacy")


def check_mechanism(body: Json) -> None:
    """Its parameters are the plan's."""
    plan, given = body["contract"]["plan"], body["mechanism"]
    one_sum = plan["method"]["name"] in {"private_prototypes", "discriminant"}
    same = ("unit", "sample_rate", "steps_per_round", "max_retrains", "max_grad_norm", "update_divisor")
    wanted = {name: plan["privacy"][name] for name in same} | {
        "noise_multiplier": sigma_of(body),
        "rounds": plan["training"]["rounds"],
        "releases": body["contract"]["lock"]["releases"],
        "method": plan["method"]["name"],
        "loss": None if one_sum else plan["method"]["loss"],
    }
    need(all(given[name] == value for name, value in wanted.items()), "it has other parameters than the plan")
    words = {"name": given["name"], "notes": given["notes"]}
    part = "mechanism/one-sum" if one_sum else "mechanism/steps"
    need(TEXTS.get(part) == text_hash(words), "its description was changed")


def check_federation(out: Printed, report: Json) -> None:
    """The coordinator's report and the silos' reports in it."""
    body = report["body"]
    out.check("plan and roster", lambda: check_agreed(body))
    out.check("signature", lambda: check_signature(report))
    held = out.check("receipts", lambda: by_silo(body))
    if held is None:
        return
    for inner in body["reports"]:
        silo = inner["body"]["silo"]
        same = inner["body"]["contract"] == body["contract"] and inner["body"]["roster"] == body["roster"]
        out.check(f"{silo}: of this run", lambda same=same: need(same, "it has another plan or roster"))  # type: ignore[misc]
        check_silo(out, inner, f"{silo}: ", held.get(silo, ()))
    out.check("silos", lambda: check_summaries(body, held))
    out.check("models", lambda: check_same_models(body))
    if body["contract"]["plan"]["privacy"] is not None:
        out.check("arithmetic", lambda: check_together(body))
    else:
        out.check("no claim", lambda: need(body["claim"] is None, "a claim is made for a plan without privacy"))


def by_silo(body: Json) -> dict[str, list[bytes]]:
    """The receipts that the coordinator holds, each signed by it and for a silo of this roster."""
    silos, held = {member["name"] for member in body["roster"]["members"]} - {"aggregator"}, dict[str, list[bytes]]()
    for wire in map(bytes.fromhex, body["receipts"]):
        silo = open_receipt(wire, body)["silo"]
        need(silo in silos, f"a receipt is of {silo}, who is not in the roster")
        held.setdefault(silo, []).append(wire)
    return held


def check_same_models(body: Json) -> None:
    """The coordinator's, and that the silos have no others."""
    check_models(body)
    mine = {model["round"]: model["digest"] for model in body["models"]}
    for inner in body["reports"]:
        for model in inner["body"]["models"]:
            same = mine.get(model["round"], model["digest"]) == model["digest"]
            need(same, f"{inner['body']['silo']} has another model of round {model['round']} than the coordinator")


def check_summaries(body: Json, held: dict[str, list[bytes]]) -> None:
    """One line for each silo of the roster."""
    reports = {inner["body"]["silo"]: inner["body"] for inner in body["reports"]}
    newer = [silo for silo, inner in reports.items() if inner["version"] > body["version"]]
    need(not newer, f"the report of {', '.join(newer)} is of a newer version than this one")
    need([inner["body"]["silo"] for inner in body["reports"]] == sorted(reports), "reports are not in order, or twice")
    need(
        body["planned_rounds"] == body["contract"]["plan"]["training"]["rounds"],
        "the planned rounds are not the plan's",
    )
    for silo, inner in reports.items():
        known = silo in held or not (inner["ledger"] and inner["ledger"]["uploaded"])
        need(known, f"{silo} shows uploads, and no receipt for one is here from the coordinator's own store")
    silos = [member["name"] for member in body["roster"]["members"] if member["name"] != "aggregator"]
    need([line["silo"] for line in body["silos"]] == silos, "the silos are not those of the roster")
    for line in body["silos"]:
        inner = reports.get(line["silo"])
        need(line["reported"] == (inner is not None), f"whether {line['silo']} reported is said wrongly")
        claim = inner["claim"] if inner else None
        spent = claim["spent"] if claim else {"trained": [], "retrains": 0, "epsilon": None, "replace_one": None}
        same = all(line[name] == spent[name] for name in ("trained", "retrains", "epsilon", "replace_one"))
        need(same, f"the line on {line['silo']} says something else than its report")
    check_part(body, "not_covered", not_covered_ids(body))


def check_together(body: Json) -> None:
    """One silo, and all of them."""
    privacy, claim = body["contract"]["plan"]["privacy"], body["claim"]
    need(claim is not None, "a plan with privacy, and no claim")
    delta, rounds = privacy["delta"], rounds_of(body)
    claims = [inner["body"]["claim"]["epsilon"] for inner in body["reports"]]
    worst = max([epsilon(charge(body, rounds), delta), *claims])
    at_least(claim["worst_silo"], worst, "epsilon at one silo")
    everywhere = max(worst, epsilon(charge(body, rounds * len(body["silos"])), delta))
    at_least(claim["all_silos"], everywhere, "epsilon over all silos")
    need(claim["delta"] == delta, "delta is not the plan's")
    together = "nothing" if claim["all_silos"] is None else f"ε = {claim['all_silos']:.4f}"
    values = {"federation": body["federation"], "worst": claim["worst_silo"], "everywhere": together}
    check_sentence("together", claim, unit=privacy["unit"], delta=delta, **values)


def main() -> int:
    """Check the file that the command line names."""
    parser = argparse.ArgumentParser(description="Check a privacy report of fedclip-secure.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--plan", help="sha256:... that people agreed on")
    parser.add_argument("--roster", help="sha256:... that people agreed on")
    options = parser.parse_args()
    out = Printed()
    report = out.check("canonical bytes", lambda: parse(_read(options.report)))
    if report is not None:
        out.check("all checks were made", lambda: check(out, report, options))
    if out.open and not out.failed:
        say("")
        say("Left open, as it says itself:")
    for line in [] if out.failed else out.open:
        say(f"- {line}")
    say("")
    say("No file can show:")
    for line in CANNOT:
        say(f"- {line}")
    if out.tests_failed and not out.failed:
        say(f"FAILED on a silo's own machine: {', '.join(out.tests_failed)}; do not rely on the claim")
    say(f"{options.report}: {outcome(out, options)}")
    return 1 if out.failed else 0


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MOST_BYTES + 1)


def outcome(out: Printed, options: argparse.Namespace) -> str:
    """The verdict."""
    if out.failed:
        return "NOT verified"
    left = [name for name in ("plan", "roster") if getattr(options, name) is None]
    found = f"consistent in itself; {' and '.join(left)} not compared" if left else "verified"
    return f"{found}; but tests of the mechanism FAILED" if out.tests_failed else found


def check(out: Printed, report: Json, options: argparse.Namespace) -> None:
    """One report of either kind."""
    if out.check("fields", lambda: check_report_form(report)) is None:
        return
    body = report["body"]
    for name, found in (("plan", body["contract"]["digest"]), ("roster", body["roster"]["digest"])):
        wanted, fact = getattr(options, name), f"the report is about sha256:{found}"
        if wanted is None:
            say(f"compare {name}: sha256:{found}")
        else:
            out.check(f"{name} pin", lambda w=wanted, f=found, t=fact: need(w == f"sha256:{f}", t))  # type: ignore[misc]
    if body["kind"] == "silo":
        check_silo(out, report, "")
    else:
        check_federation(out, report)


if __name__ == "__main__":
    sys.exit(main())
