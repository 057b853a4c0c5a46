from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedclip_secure.errors import DataError, ModelError
from fedclip_secure.methods.base import MethodSpec
from fedclip_secure.training.shared_parameters import read_shared
from fedclip_secure.training.unshared_state import PrivateState

SPEC = MethodSpec(frozenset({"image_features"}), "none", ("shared.*",), ("local.*",), True, True)
RUN = bytes(32)


def make_module(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"shared": nn.Linear(3, 2), "local": nn.Linear(3, 2)})


def local_of(module: nn.Module) -> list[list[float]]:
    found: list[list[float]] = module.get_parameter("local.weight").tolist()
    return found


def a_round(kept: PrivateState, module: nn.Module, start: nn.Module) -> list[list[float]]:
    """Train the private part by adding 1; what it was before."""
    kept.begin(module, SPEC, read_shared(start, SPEC))
    before = local_of(module)
    with torch.no_grad():
        module.get_parameter("local.weight").add_(1)
    kept.finish(module, SPEC)
    return before


def test_private_part_goes_on_where_it_was_in_another_process_too(tmp_path: Path) -> None:
    path, module = tmp_path / "kept.safetensors", make_module(0)
    first = a_round(PrivateState(path, RUN), module, make_module(1))
    second = a_round(PrivateState(path, RUN), make_module(5), make_module(2))
    assert np.allclose(second, np.array(first) + 1, atol=1e-6)


def test_a_round_that_is_trained_again_starts_from_where_it_did(tmp_path: Path) -> None:
    path, start = tmp_path / "kept.safetensors", make_module(1)
    first = a_round(PrivateState(path, RUN), make_module(0), start)
    assert a_round(PrivateState(path, RUN), make_module(7), start) == first


def test_training_that_ran_away_leaves_what_was_kept(tmp_path: Path) -> None:
    kept = PrivateState(tmp_path / "kept.safetensors", RUN)
    module = make_module(0)
    first = a_round(kept, module, make_module(1))
    kept.begin(module, SPEC, read_shared(make_module(2), SPEC))
    with torch.no_grad():
        module.get_parameter("local.weight").fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN or infinity"):
        kept.finish(module, SPEC)
    again = PrivateState(tmp_path / "kept.safetensors", RUN)
    assert np.allclose(a_round(again, make_module(3), make_module(2)), np.array(first) + 1, atol=1e-6)


def test_the_private_part_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    a_round(PrivateState(path, RUN), make_module(0), make_module(1))
    with pytest.raises(DataError, match=r"kept\.safetensors': is of another run; remove it"):
        PrivateState(path, bytes([1] * 32))


def test_a_damaged_file_is_named_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(DataError, match=r"kept\.safetensors': is damaged.*begins anew"):
        PrivateState(path, RUN)
    assert path.exists()


def test_another_methods_private_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    a_round(PrivateState(path, RUN), make_module(0), make_module(1))
    wider = nn.ModuleDict({"shared": nn.Linear(3, 2), "local": nn.Linear(3, 5)})
    with pytest.raises(ModelError, match=r"kept\.safetensors': parameter 'local\.weight'.*remove the file"):
        PrivateState(path, RUN).begin(wider, SPEC, read_shared(wider, SPEC))
