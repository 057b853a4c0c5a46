"""Flower's SecAgg+, one operation on request: JSON lines in on stdin, JSON lines out on stdout.

Runs under an interpreter that has `flwr` and nothing of this project. The clients are the functions of
`flwr.client.mod`, the server is `SecAggPlusWorkflow`; what stands here is only the wire between them. Left out of
the timings, in Flower's favour: its messages' serialisation, its mod's saving of the state between stages, and the
server's adding up of the masked vectors, which has an operation of its own (`add`).
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import pickle
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key

client = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
server = importlib.import_module("flwr.server.workflow.secure_aggregation.secaggplus_workflow")
server.Message = SimpleNamespace  # real ones want to know which task of Flower's runtime they belong to
_RECORD = SimpleNamespace(config_records={server.MAIN_CONFIGS_RECORD: {server.WorkflowKey.CURRENT_ROUND: 1}})
_EXAMPLES, _MAX_WEIGHT, _CLIP = 100, 1000.0, 0.1
Vectors = list[np.ndarray[Any, Any]]


class Alone:
    """One client of a `Round`, in a process that knows no others: what `Round` left in a file for it."""

    def __init__(self, alone: str) -> None:
        # Written by the round's process just now.
        self._before, self._others, self._after, self._inbox, self._sent = pickle.loads(Path(alone).read_bytes())  # noqa: S301

    def share(self) -> float:
        """Seconds of `_share_keys`."""
        state = copy.deepcopy(self._before)
        return _seconds(lambda: client._share_keys(state, self._others))

    def mask(self) -> float:
        """Seconds of `_collect_masked_vectors`: from shares and update to bytes."""
        state = copy.deepcopy(self._after)
        return _seconds(lambda: client._collect_masked_vectors(state, self._inbox, _EXAMPLES, self._sent))


class Round:
    """All clients of one round, and its server."""

    def __init__(self, clients: int, neighbours: int, threshold: int, parameters: int, alone: str) -> None:
        self._workflow = server.SecAggPlusWorkflow(
            neighbours + 1, threshold, max_weight=_MAX_WEIGHT, clipping_range=_CLIP
        )
        nodes, half = list(range(1, clients + 1)), neighbours // 2
        # The ring of its setup stage: so many on either side, and the node itself.
        self._around = {
            node: {nodes[(place + offset) % clients] for offset in range(-half, half + 1)}
            for place, node in enumerate(nodes)
        }
        random = np.random.default_rng(0)
        self._updates = {node: random.uniform(-_CLIP, _CLIP, parameters).astype(np.float32) for node in nodes}
        self._sent = {node: ndarrays_to_parameters([update]) for node, update in self._updates.items()}
        self._states = {node: client.SecAggPlusState(nid=node) for node in nodes}
        self._keys = {node: self._set_up(node, clients) for node in nodes}
        before = copy.deepcopy(self._states[1])
        shares = {node: client._share_keys(self._states[node], self._others(node)) for node in nodes}
        inboxes = {node: self._inbox(node, shares) for node in nodes}
        kept = (before, self._others(1), self._states[1], inboxes[1], self._sent[1])
        Path(alone).write_bytes(pickle.dumps(kept))
        self._masked = {node: self._mask(node, inboxes[node]) for node in nodes}
        self.upload_bytes = sum(map(len, self._masked[1]))

    def add(self, dropped: int = 0) -> float:
        """Seconds in which the server adds up the masked vectors, as its third stage does."""
        return _seconds(lambda: self._sum(self._alive(dropped)))

    def unmask(self, dropped: int = 0) -> float:
        """Seconds of the server's `unmask_stage` after the last `dropped` clients have not sent a vector.

        The shares are answered before the clock starts. The average that comes out must be right.
        """
        alive = self._alive(dropped)
        state = self._state_of_server(alive)
        answers = [_message(node, self._release(node, alive)) for node in alive]
        grid = SimpleNamespace(send_and_receive=lambda *_, **__: answers)
        context = SimpleNamespace(state=_RECORD, strategy=SimpleNamespace(aggregate_fit=lambda *_: (None, {})))
        average = state.legacy_results[0][1]
        seconds = _seconds(lambda: self._workflow.unmask_stage(grid, context, state))
        wanted = np.mean([self._updates[node] for node in alive], axis=0)
        error = np.abs(parameters_to_ndarrays(average.parameters)[0] - wanted).max()
        if error > _CLIP / 10_000:
            raise AssertionError(f"Flower's average is off by {error}: it was not driven as it should be")
        return seconds

    def _set_up(self, node: int, clients: int) -> list[bytes]:
        """Stage 0 of one client: its two public keys."""
        workflow = self._workflow
        configs = {
            Key.SAMPLE_NUMBER: clients,
            Key.SHARE_NUMBER: workflow.num_shares,
            Key.THRESHOLD: workflow.reconstruction_threshold,
            Key.CLIPPING_RANGE: workflow.clipping_range,
            Key.TARGET_RANGE: workflow.quantization_range,
            Key.MOD_RANGE: workflow.modulus_range,
            Key.MAX_WEIGHT: workflow.max_weight,
        }
        answer = client._setup(self._states[node], configs)
        return [answer[Key.PUBLIC_KEY_1], answer[Key.PUBLIC_KEY_2]]

    def _others(self, node: int) -> dict[str, list[bytes]]:
        return {str(other): self._keys[other] for other in self._around[node]}

    def _inbox(self, node: int, shares: dict[int, dict[str, Any]]) -> dict[str, list[Any]]:
        """What the server forwards to one client before it masks."""
        sources = [other for other in self._around[node] if other != node]
        sealed = [
            dict(zip(shares[other][Key.DESTINATION_LIST], shares[other][Key.CIPHERTEXT_LIST], strict=True))[node]
            for other in sources
        ]
        return {Key.SOURCE_LIST: sources, Key.CIPHERTEXT_LIST: sealed}

    def _mask(self, node: int, inbox: dict[str, list[Any]]) -> list[bytes]:
        answer = client._collect_masked_vectors(self._states[node], inbox, _EXAMPLES, self._sent[node])
        return list(answer[Key.MASKED_PARAMETERS])

    def _alive(self, dropped: int) -> list[int]:
        return list(self._states)[: len(self._states) - dropped]

    def _sum(self, alive: list[int]) -> Vectors:
        total: Vectors | None = None
        for node in alive:
            vector = [bytes_to_ndarray(part) for part in self._masked[node]]
            total = vector if total is None else parameters_addition(total, vector)
        return list(parameters_mod(total, self._workflow.modulus_range))

    def _release(self, node: int, alive: list[int]) -> dict[str, Any]:
        """One client's answer at the last stage."""
        around, living = self._around[node], set(alive)
        wanted = {Key.ACTIVE_NODE_ID_LIST: list(around & living), Key.DEAD_NODE_ID_LIST: list(around - living)}
        return dict(client._unmask(self._states[node], wanted))

    def _state_of_server(self, alive: list[int]) -> Any:
        workflow = self._workflow
        return server.WorkflowState(
            sampled_node_ids=set(self._states),
            active_node_ids=set(alive),
            threshold=workflow.reconstruction_threshold,
            clipping_range=workflow.clipping_range,
            quantization_range=workflow.quantization_range,
            mod_range=workflow.modulus_range,
            nid_to_neighbours=copy.deepcopy(self._around),
            nid_to_publickeys=self._keys,
            aggregate_ndarrays=self._sum(alive),
            legacy_results=[(None, SimpleNamespace(parameters=None))],
        )


def _message(node: int, answer: dict[str, Any]) -> SimpleNamespace:
    """What the workflow reads of a client's reply."""
    return SimpleNamespace(
        metadata=SimpleNamespace(src_node_id=node),
        content=SimpleNamespace(config_records={RECORD_KEY_CONFIGS: answer}),
        has_error=lambda: False,
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Serve requests `[operation, {arguments}]` until stdin ends; `open` and `load` make what the others are about."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    current: Round | Alone | None = None
    for line in sys.stdin:
        operation, arguments = json.loads(line)
        answer: Any = None
        if operation == "open":
            current = Round(**arguments)
            answer = {"version": version("flwr"), "upload_bytes": current.upload_bytes}
        elif operation == "load":
            current = Alone(**arguments)
        else:
            answer = getattr(current, operation)(**arguments)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
