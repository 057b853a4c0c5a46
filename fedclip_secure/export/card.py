"""The model card of an exported adapter, in Markdown: what plan, lock, roster and run say, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedclip_secure.config.lock import Contract, ExternalEncoder, OpenClipEncoder
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.export.adapter_facts import KEPT_HOME, Bound, Facts, privacy_statement
from fedclip_secure.export.load_script import loading, plain
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg.terms import Terms

_WEIGHTS = {"masked": "by its training records", "equal": "like all others", "public": "as the plan lists it"}


def model_card(facts: Facts, contract: Contract, roster: Roster) -> str:
    """The whole README.md."""
    plan, bound = contract.plan, Bound.of(contract)
    run = {**_run(facts, contract, roster), **_spent(facts, bound)}
    parts = [
        f"# {plan.federation}: {facts.kind} adapter, after round {facts.after_round} of {plan.training.rounds}",
        _table(
            ("fact", "value"),
            {**run, **_made_of(contract), **_digests(facts, contract, roster)},
        ),
        "## Classes",
        _table(("class", "prompts"), _prompts(contract)),
        "## Load it",
        loading(contract),
        "## Privacy",
        _privacy(facts, contract, bound),
        "## What it must not be used for",
        "\n".join(f"- {line}" for line in _limits(facts, contract, bound)),
    ]
    return "\n\n".join(parts) + "\n"


def _prompts(contract: Contract) -> dict[str, str]:
    plan = contract.plan
    if not isinstance(contract.lock.encoder, OpenClipEncoder):  # its text features were made elsewhere, or it has none
        return dict(plan.classes)
    return {name: "; ".join(lines) for name, lines in zip(plan.classes, plan.text_prompts(), strict=True)}


def _run(facts: Facts, contract: Contract, roster: Roster) -> dict[str, str]:
    terms, weights = Terms.of(contract, roster), contract.plan.secure_aggregation.weights
    return {
        "silos": f"{len(roster.silos)}, at least {terms.floor} of them in a round; each weighs {_WEIGHTS[weights]}",
        "method": _options(contract.plan.method.model_dump(mode="json")),
        "training": _training(contract.plan),
        **({} if facts.personal is None else {"made personal": _options(facts.personal)}),
        "validation": _validation(facts),
    }


def _spent(facts: Facts, bound: Bound | None) -> dict[str, str]:
    """Nothing bounds what a personal adapter tells, nor one whose plan has no privacy."""
    if bound is None or facts.kept_home:
        return {}
    return {
        "epsilon": f"{bound.epsilon:.4f} at delta {bound.delta:g} for each {bound.unit}, over all {bound.rounds} "
        "round(s) that the plan allows; see Privacy below"
    }


def _training(plan: FederationPlan) -> str:
    optimizer = _options(plan.training.optimizer.model_dump(mode="json"))
    privacy = plan.privacy
    if privacy is None:
        return f"a round is {plan.training.local_epochs} epoch(s), batches of {plan.training.batch_size}, {optimizer}"
    chance = f"each {privacy.unit} in one with chance {privacy.sample_rate:g}"
    return f"a round is {privacy.steps_per_round} step(s), {chance}, {optimizer}"


def _validation(facts: Facts) -> str:
    if not facts.total:
        return "nobody counted"
    share = 100 * facts.correct / facts.total
    return f"{facts.correct} of {facts.total} records right ({share:.1f} %), of {facts.scope}"


def _made_of(contract: Contract) -> dict[str, str]:
    encoder, layout = contract.lock.encoder, contract.lock.layout
    arrays = ", ".join(f"{entry.name} ({' x '.join(map(str, entry.shape))})" for entry in layout)
    facts = {"parameters": f"{sum(math.prod(entry.shape) for entry in layout):,} float32: {arrays}"}
    if isinstance(encoder, ExternalEncoder):
        text = encoder.text_features_sha256
        return {**facts, "encoder": f"the silos' own, {encoder.dim} features; text features SHA-256 {text}"}
    return {
        **facts,
        "encoder": f"{encoder.name}, {encoder.dim} features; weights SHA-256 {encoder.weights_sha256}",
        "preprocessing": _options(encoder.preprocessing.model_dump(mode="json")),
        "logit scale": str(encoder.logit_scale),
    }


def _digests(facts: Facts, contract: Contract, roster: Roster) -> dict[str, str]:
    return {"adapter digest": facts.model.hex(), "plan": contract.pin, "roster": roster.pin}


def _privacy(facts: Facts, contract: Contract, bound: Bound | None) -> str:
    statement = privacy_statement(contract, bound)
    said = f"{statement[0].upper()}{statement[1:]}."
    if not facts.kept_home:
        return said
    return f"**This is one silo's own adapter**, {KEPT_HOME}.\n\nOf the global one that it was made of: {statement}."


def _limits(facts: Facts, contract: Contract, bound: Bound | None) -> list[str]:
    """What follows from how it was made."""
    counted = "the validation above is all that was measured" if facts.total else "nobody counted validation records"
    lines = [
        "With features of another encoder, of other weights or after another preprocessing: its parameters mean "
        "nothing there.",
        f"For images of anything else: it answers with one of its {len(contract.plan.classes)} classes, come what may.",
        f"As a proof of how good it is elsewhere: {counted}, and that on images of those who trained it. Nothing here "
        "shows that it is fit for decisions about people.",
    ]
    if facts.kept_home:
        return [*lines, "Outside of the house that trained it: it may tell about its training records."]
    if bound is None:
        lines.append("By whoever may not learn about the training records: nothing bounds what it tells about them.")
    return lines


def _options(values: Mapping[str, Any]) -> str:
    """`adam, lr 0.001, betas [0.9, 0.98]`, in full precision."""
    plain = {key: f"({_options(value)})" if isinstance(value, Mapping) else str(value) for key, value in values.items()}
    listed = [f"{key} {value}" for key, value in plain.items() if key != "name"]
    return ", ".join([plain["name"], *listed] if "name" in plain else listed)


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [head, ("---", "---"), *rows.items()]
    return "\n".join("| " + " | ".join(plain(cell) for cell in line) + " |" for line in lines)
