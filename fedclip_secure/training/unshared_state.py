"""The parameters that a method trains at a silo and never sends, kept from round to round."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError, ModelError
from fedclip_secure.files import write_atomically
from fedclip_secure.methods.base import MethodSpec
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.shared_parameters import load_private, read_private


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """The private parameters `before` and `after` a round from the shared model with digest `start`."""

    start: bytes
    before: AdapterState
    after: AdapterState


class PrivateState:
    """Kept in the file `path` of one run, whose contract has the digest `run`; or, without a file, in memory.

    A round that is trained again, because its first attempt came to nothing, begins again from the private
    parameters that it began from the first time.

    Raises:
        DataError: the file is damaged, or another run's: what was trained without noise must not get into a run with.
    """

    def __init__(self, path: Path | None = None, run: bytes = b"") -> None:
        self._path, self._run = path, run.hex()
        self._last = None if path is None else _read(path, self._run)
        self._begun: tuple[bytes, AdapterState] | None = None

    def begin(self, module: nn.Module, spec: MethodSpec, received: AdapterState) -> None:
        """Load what a round from `received` starts from; at first what `module` was built with.

        Raises:
            ModelError: the file is another method's.
        """
        if not spec.private:
            return
        start = received.digest
        if self._last is not None:
            state = self._last.before if self._last.start == start else self._last.after
            try:
                load_private(module, spec, state)
            except ModelError as error:
                raise ModelError(f"'{self._path}': {error}; remove the file to begin anew") from error
        self._begun = start, read_private(module, spec)

    def finish(self, module: nn.Module, spec: MethodSpec) -> None:
        """Keep what the round made, on the disk before this returns.

        Raises:
            ModelError: training ran to NaN or infinity; what was kept stays.
            DataError: the disk refuses.
        """
        if self._begun is None:
            return
        self._last, self._begun = _Step(*self._begun, read_private(module, spec)), None
        if self._path is not None:
            _write(self._path, self._last, self._run)


def _write(path: Path, step: _Step, run: str) -> None:
    parts = {"before": step.before, "after": step.after}
    arrays = {f"{kind}.{name}": array for kind, state in parts.items() for name, array in state.arrays().items()}
    write_atomically(path, save(arrays, {"start": step.start.hex(), "run": run}))


def _read(path: Path, run: str) -> _Step | None:
    if not path.exists():
        return None
    try:
        path.open("rb").close()  # safe_open's own errors carry no errno
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.offset_keys()}
            start, whose = bytes.fromhex(file.metadata()["start"]), file.metadata()["run"]
        before, after = (
            AdapterState.from_arrays(
                {name.removeprefix(kind): array for name, array in arrays.items() if name.startswith(kind)}
            )
            for kind in ("before.", "after.")
        )
    except OSError as error:
        raise DataError(refused(error, path)) from error
    except (SafetensorError, ValueError, KeyError, TypeError, ModelError) as error:
        raise DataError(
            f"'{path}': is damaged ({error}); restore it, or remove it: the private part of the method begins anew"
        ) from error
    if whose != run:
        raise DataError(f"'{path}': is of another run; remove it: the private part of the method begins anew")
    return _Step(start, before, after)
