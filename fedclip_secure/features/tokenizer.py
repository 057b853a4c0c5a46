"""Tokenizers of CLIP models: where they come from, and the one digest by which all silos have the same.

What is pinned is what a tokenizer makes of the plan's phrases and prompts, and of a few fixed texts. That is exact: it
is all that decides a text feature. Hashes of its files are not: which of them are read, and what is made of them, is
for the versions of transformers, open_clip and ftfy to say, and another line in a file may change nothing. The fixed
texts tell vocabularies apart that agree on a plan's few words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import snapshot_download

from fedclip_secure import canonical
from fedclip_secure.config.lock import OpenClipEncoder
from fedclip_secure.errors import ConfigError, ModelError
from fedclip_secure.extras import check_installed
from fedclip_secure.features.checkpoint import register
from fedclip_secure.features.download import check_answers, first_line

Tokenizer = Callable[[list[str]], torch.Tensor]
_PROBES = (  # one for each of: no text, case and signs, words without prompts, accents, other letters, length
    "",
    "A photo of the Left lung (PA view), 12.5 % - no-finding/COVID-19; it's new",
    "X X X X pneumothorax.",
    "Größe, naïve façade, señal",
    "Рентген грудной клетки; 胸部 X 线",
    "word " * 300,
)


def tokenizer_of(lock: OpenClipEncoder, folder: Path | None) -> Tokenizer:
    """Texts to tokens (P, L) int64; from a local `folder`, or else as the model's config says.

    Raises:
        ConfigError: it needs a package that is not installed.
        ModelError: the folder holds no tokenizer, or a download fails.
    """
    config = json.loads(lock.config)
    hub = config["text_cfg"].get("hf_tokenizer_name")
    if folder is None and not hub:
        return _built_in(lock.config)
    check_installed("transformers", f"the tokenizer of {lock.name}")
    if folder is not None:
        return _read(lock, folder)
    return _fetched(lock, hub)


def tokens_sha256(tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """SHA-256 over the tokens of `texts` and of the fixed ones, as 64 hex digits."""
    tokens = tokenizer([*_PROBES, *texts]).cpu().numpy().astype("<i8")
    return canonical.digest("fedclip/v1/tokens", list(tokens.shape), tokens.tobytes()).hex()


def check_tokens(lock: OpenClipEncoder, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Refuse a tokenizer that is not the coordinator's: its features would be others, without any error.

    Raises:
        ModelError: it makes other tokens.
    """
    digest = tokens_sha256(tokenizer, texts)
    if digest != lock.tokens_sha256:
        raise ModelError(
            f"the tokenizer of {lock.name} makes other tokens here than at the coordinator\n"
            f"  SHA-256 here: {digest}\n  SHA-256 lock: {lock.tokens_sha256}\n"
            "copy the coordinator's folder of it and set `tokenizer: PATH` in silo.yaml; without one, install the "
            "versions of open_clip_torch, ftfy and transformers that it has"
        )


@cache
def _built_in(config: str) -> Tokenizer:
    """CLIP's own, which open_clip brings along. Kept: a simulation asks for it for each cell, and it takes a while."""
    return open_clip.get_tokenizer(register(json.loads(config)))  # type: ignore[no-any-return]


@cache
def _of_hugging_face(config: str, source: str, local: bool) -> Tokenizer:
    """From a folder or a repository; `local`: from this machine alone. A repository's own code is never run."""
    changed: dict[str, Any] = json.loads(config)
    changed["text_cfg"] |= {"hf_tokenizer_name": source}
    options = {"trust_remote_code": False, "local_files_only": local}
    return open_clip.get_tokenizer(register(changed), **options)  # type: ignore[no-any-return]


def _read(lock: OpenClipEncoder, folder: Path) -> Tokenizer:
    if not folder.is_dir():
        raise ConfigError(
            f"'{folder}': is no folder; `tokenizer` names one that holds the tokenizer's files, as tokenizer.json and "
            "tokenizer_config.json"
        )
    try:
        return _of_hugging_face(lock.config, str(folder), True)
    except Exception as error:  # transformers, tokenizers and the system raise their own kinds
        raise ModelError(
            f"'{folder}': holds no tokenizer that can be read ({first_line(error)}); copy all of its repository's "
            "files but the weights, among them tokenizer.json and tokenizer_config.json"
        ) from error


def _fetched(lock: OpenClipEncoder, hub: str) -> Tokenizer:
    what = f"the tokenizer of {lock.name}"
    remedy = (
        "copy the tokenizer's files and name their folder: `model.tokenizer` in federation.yaml, `tokenizer` in "
        "silo.yaml"
    )
    with suppress(Exception):  # as in `_read`: not all of it lies in the cache
        return _of_hugging_face(lock.config, snapshot_download(hub, local_files_only=True), True)
    check_answers(hub, "tokenizer_config.json", what, remedy)
    try:
        return _of_hugging_face(lock.config, hub, False)
    except Exception as error:
        raise ModelError(f"{what}, {hub!r}, cannot be loaded ({first_line(error)}); {remedy}") from error
