"""Files of a hub: from this machine's cache, else over the network, of which a short look is taken before a long wait.

The hub's client repeats each request that nobody answers, and libraries ask it for one file after the other: without
a network that took most of a minute, and ended in the name of one file.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from fedclip_secure.errors import ModelError

_NAME_IT = "name a copy of that file: `model.pretrained` in federation.yaml, `weights` in silo.yaml"
_PATIENCE = 10.0  # seconds for a first answer, the look-up of the name included


def from_hub(repository: str, names: Sequence[str], what: str, remedy: str = _NAME_IT) -> Path:
    """The first of the files `names` that the repository has, by the cache alone where that tells.

    A later one that the cache has is taken only where the repository is known to lack those before it, or nobody
    answers: else two machines would take two files.

    Raises:
        ModelError: `what` it was, its address, where it would lie, and the `remedy`.
    """
    _address(repository, names[0], what, remedy)
    for name in names:
        path = try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            return Path(path)
        if path is None:  # and not the mark that the repository lacks it
            break
    try:
        check_answers(repository, names[0], what, remedy)
    except ModelError:
        for name in names[1:]:
            if isinstance(path := try_to_load_from_cache(repository, name), str):
                return Path(path)
        raise
    lacked: EntryNotFoundError | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except EntryNotFoundError as error:
            lacked = error
        except Exception as error:  # the hub's client raises its own, its transport's and the system's errors
            raise _failed(repository, name, what, first_line(error), remedy) from error
    raise _failed(repository, names[-1], what, first_line(lacked or FileNotFoundError()), remedy) from lacked


def check_answers(repository: str, name: str, what: str, remedy: str) -> None:
    """Ask for the head of a file once; whatever is answered, there is a network.

    Raises:
        ModelError: nobody answers; as `from_hub`.
    """
    address = _address(repository, name, what, remedy)
    found: list[str] = []
    asking = threading.Thread(target=_ask, args=(address, found), daemon=True)
    asking.start()
    asking.join(_PATIENCE)  # a resolver without a network takes longer than any timeout of the request
    reason = f"no answer within {_PATIENCE:.0f} s" if asking.is_alive() else "".join(found)
    if reason:
        raise _failed(repository, name, what, reason, remedy)


def _address(repository: str, name: str, what: str, remedy: str) -> str:
    try:
        return hf_hub_url(repository, name)
    except HFValidationError as error:
        raise ModelError(f"{what}: {repository!r} is no name of a repository of Hugging Face; {remedy}") from error


def _ask(url: str, found: list[str]) -> None:
    try:
        get_session().head(url, timeout=_PATIENCE)
    except Exception as error:  # as in `from_hub`
        found.append(first_line(error))


def _failed(repository: str, name: str, what: str, reason: str, remedy: str) -> ModelError:
    folder = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
    return ModelError(
        f"{what} cannot be downloaded ({reason}): {hf_hub_url(repository, name)} would lie in {folder}; copy that "
        f"folder from a machine with internet that has it, or {remedy}"
    )


def first_line(error: Exception) -> str:
    """What another library's error says, in one line of at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
