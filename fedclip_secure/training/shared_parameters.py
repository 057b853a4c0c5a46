"""Between a module and its parameters that travel, or stay, as named arrays."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedclip_secure.errors import ModelError
from fedclip_secure.methods.base import MethodSpec
from fedclip_secure.model.state import AdapterState


def parameters_like(module: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that are trained and whose name fits one of `patterns`, in the module's order."""
    named = ((name, value) for name, value in module.named_parameters() if value.requires_grad)
    return {name: value for name, value in named if any(fnmatchcase(name, pattern) for pattern in patterns)}


def read_shared(module: nn.Module, spec: MethodSpec, names: Sequence[str] | None = None) -> AdapterState:
    """The shared parameters as one state, in the order of `names` (default: the module's).

    Raises:
        ModelError: they hold NaN or infinity.
    """
    return _read(module, spec.shared, names)


def read_private(module: nn.Module, spec: MethodSpec) -> AdapterState:
    """The parameters that are trained here and never sent.

    Raises:
        ModelError: there are none, or they hold NaN or infinity.
    """
    return _read(module, spec.private)


def load_shared(module: nn.Module, spec: MethodSpec, state: AdapterState) -> None:
    """Copy `state` into the shared parameters.

    Raises:
        ModelError: other names or shapes than the method's; names the first difference.
    """
    _load(module, spec.shared, state)


def load_private(module: nn.Module, spec: MethodSpec, state: AdapterState) -> None:
    """Copy `state` into the parameters that stay here.

    Raises:
        ModelError: as `load_shared`.
    """
    _load(module, spec.private, state)


def update_since(module: nn.Module, spec: MethodSpec, received: AdapterState) -> npt.NDArray[np.float64]:
    """What training made of the shared parameters: trained minus `received`, (received.layout.size,) float64.

    Raises:
        ModelError: training ran to NaN or infinity.
    """
    try:
        trained = read_shared(module, spec, [name for name, _ in received.layout.entries])
    except ModelError as error:
        raise ModelError("training ran to NaN or infinity; the plan's `training.optimizer.lr` is too high") from error
    return trained.vector.astype(np.float64) - received.vector.astype(np.float64)


def _read(module: nn.Module, patterns: Sequence[str], names: Sequence[str] | None = None) -> AdapterState:
    found = parameters_like(module, patterns)
    return AdapterState.from_arrays({name: value.detach().cpu().numpy() for name, value in found.items()}, names)


@torch.no_grad()
def _load(module: nn.Module, patterns: Sequence[str], state: AdapterState) -> None:
    found = parameters_like(module, patterns)
    here = {name: tuple(value.shape) for name, value in found.items()}
    there = dict(state.layout.entries)
    for name in {**here, **there}:
        if here.get(name) != there.get(name):
            raise ModelError(
                f"parameter {name!r}: the plan's method has shape {here.get(name, '(absent)')}, the adapter "
                f"{there.get(name, '(absent)')}; it comes from another encoder or method"
            )
    for name, array in state.arrays().items():
        found[name].copy_(torch.from_numpy(array))
