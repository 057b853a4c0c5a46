"""Secure aggregation against Flower's SecAgg+, against AES-256-CTR, and against a server of plain vectors.

`python benchmarks/secagg.py [--quick] [--json]`: the vector is the adapter's, 525,312 float32 parameters; everybody
takes turns on one machine, and the best time of each counts (of whole rounds the median).

- Client share: Flower's `_share_keys`; ours is `SiloSession.share`: from the list of keys to what is sealed to
  every peer, signatures and keys checked.
- Client mask: Flower's `_collect_masked_vectors`: from the peers' sealed shares and the float32 update to serialised
  arrays. Ours, from the same to a signed body that is sealed to the aggregator: round to the grid, check list and
  inbox, derive keys, mask, hash, sign, seal.
- Server unmask: Flower's `unmask_stage` with all shares at hand. Ours, from t sealed answers to the sum: open and
  check them, add up the masked vectors (in Flower that happens before, and is left out), take the masks away.
- Upload: bytes of one masked vector as it is sent.
- AES: 50 masks applied to one vector, against the cipher alone filling a reused buffer with as many bytes; both on
  one core. Everything else may use all cores.
- Whole rounds: eight silos over mutual TLS, each in a process, with the package's own server, runners and journals,
  and with `verify_sum` as plans have it by default; against the same stack for plain vectors (`peers/plain.py`).
- Growth, left out by --quick: single rounds of more silos and larger models. What is as long as the model lies in
  files, and writing and syncing them is part of the times; memory is a process's peak beyond its start, mapped
  files included, and for adapters mostly messages; bytes are HTTP bodies from joining on.

Flower is installed into an environment of its own on first use (see `peers/environment.py` for the reason).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from secure import growth, loopback
from secure.compare import SIZES, Compared, Masking, against_aes, against_flower

PARAMETERS = 525_312
SILOS, ROUNDS = 8, 7  # of whole rounds; the first lasts from start to average and is not counted
TIMES = 2  # that they are run
MASK_TARGET, SHARE_TARGET = 5.0, 3.0  # times as fast as Flower
UNMASK_TARGETS = {"server unmask": 100.0, "server unmask after drop-outs": 50.0}
UPLOAD_TARGET = 0.55  # of Flower's bytes
AES_TARGET = 0.5  # of the cipher's own speed
_QUIET = 0.5  # load average; above it others are at work


def whole_rounds() -> dict[str, float]:
    """Median seconds of a round: secure as by default, secure without `verify_sum`, plain."""
    kinds: dict[str, tuple[str, Callable[[loopback.Site], list[float]]]] = {
        "secure": ("auto", loopback.secure_rounds),
        "unverified": ("never", loopback.secure_rounds),
        "plain": ("never", loopback.plain_rounds),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(TIMES):
        for kind, (verify_sum, run) in kinds.items():
            with tempfile.TemporaryDirectory() as folder:
                site = loopback.make_site(Path(folder), SILOS, PARAMETERS, ROUNDS, verify_sum)
                seconds[kind] += run(site)
    return {kind: statistics.median(times) for kind, times in seconds.items()}


def figures(
    compared: dict[int, Compared], masking: Masking, rounds: dict[str, float], grown: list[growth.Grown]
) -> dict[str, object]:
    """What `--json` prints."""
    largest = compared[50]
    return {
        "client_mask_ratio_n20": compared[20].ratio("client mask"),
        "client_mask_ratio_n50": largest.ratio("client mask"),
        "share_ratio_n50": largest.ratio("share"),
        "server_unmask_ratio_n50": largest.ratio("server unmask"),
        "server_unmask_ratio_n50_drop10": largest.ratio("server unmask after drop-outs"),
        "upload_bytes_ratio": largest.our_bytes / largest.flower_bytes,
        "masking_fraction_of_aes": masking.fraction,
        "secure_over_plain_round": rounds["secure"] / rounds["plain"],
        "secure_round_seconds": rounds["secure"],
        "growth": [asdict(row) for row in grown],
    }


def show(compared: dict[int, Compared], masking: Masking, rounds: dict[str, float], grown: list[growth.Grown]) -> None:
    """The same for people."""
    print(f"{PARAMETERS} parameters; milliseconds, Flower {compared[50].flower_version}, ours, times as fast")
    for row in compared.values():
        _show_compared(row)
    _show_parts(compared[50])
    print(
        f"masking: {masking.masked / 1e9:.1f} GB/s on one core, AES-256-CTR alone {masking.cipher / 1e9:.1f}: "
        f"{masking.fraction:.2f} of it (at least {AES_TARGET:g}); {masking.on_all_cores / 1e9:.1f} GB/s on all cores"
    )
    print(
        f"a round of {SILOS} silos over mutual TLS: {rounds['secure']:.2f} s, plain {rounds['plain']:.2f} s:", end=" "
    )
    print(f"{rounds['secure'] / rounds['plain']:.1f} times as long;", end=" ")
    print(f"{rounds['unverified']:.2f} s where silos do not add up again")
    if grown:
        _show_growth(grown)


def _show_compared(row: Compared) -> None:
    size = row.size
    share = {50: f"(at least {SHARE_TARGET:g})"}.get(size.silos, "")
    mask = {20: f"(at least {MASK_TARGET:g})", 50: f"(at least {MASK_TARGET:g})"}.get(size.silos, "")
    print(f"{size.silos} silos; in Flower {size.neighbours} neighbours, threshold {size.threshold}")
    for operation, target in {"share": share, "client mask": mask}.items():
        _show_ratio(row, operation, target)
    for operation, least in UNMASK_TARGETS.items():
        if operation in row.flower:
            _show_ratio(row, operation, f"(at least {least:g})" if size.silos == 50 else "")
    ratio = row.our_bytes / row.flower_bytes
    print(f"  upload: {row.flower_bytes} bytes, {row.our_bytes}: {ratio:.3f} of it (at most {UPLOAD_TARGET:g})")


def _show_ratio(row: Compared, operation: str, target: str) -> None:
    theirs, ours = row.flower[operation], row.ours[operation]
    print(f"  {operation:30}{theirs * 1e3:10.1f}{ours * 1e3:10.1f}{theirs / ours:8.1f} {target}")


def _show_parts(row: Compared) -> None:
    """Where our time goes."""
    ours = {name: seconds * 1e3 for name, seconds in row.ours.items()}
    rest = ours["mask"] - ours["masks alone"] - ours["hash alone"]
    print(f"  client mask in parts: round {ours['quantise']:.1f}, lists, inbox and keys {rest:.1f}", end=", ")
    print(f"masks {ours['masks alone']:.1f}, hash {ours['hash alone']:.1f}, seal {ours['seal']:.1f}")
    print(f"  server unmask in parts: answers {ours['answers']:.1f}, sum {ours['sum']:.1f}", end="; ")
    print(f"after drop-outs {ours['answers after drop-outs']:.1f}, {ours['sum after drop-outs']:.1f}", end="; ")
    print(f"Flower's adding up, left out above, {row.flower['add'] * 1e3:.1f}")


_COLUMNS = {
    "silos": "d", "parameters": "d", "share_seconds": ".3f", "mask_seconds": ".3f", "unmask_seconds": ".3f",
    "result_seconds": ".3f", "server_unmask_seconds": ".3f", "server_result_seconds": ".3f", "bytes_up": "d",
    "bytes_down": "d", "silo_peak_vectors": ".1f", "server_peak_vectors": ".1f",
}  # fmt: skip


def _show_growth(grown: list[growth.Grown]) -> None:
    print("growth: " + ", ".join(name.replace("_", " ") for name in _COLUMNS))
    for row in grown:
        print(
            "  "
            + "  ".join(f"{asdict(row)[name]:>{11 if kind == 'd' else 6}{kind}}" for name, kind in _COLUMNS.items())
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="leave out growth")
    options = parser.parse_args()
    if (load := os.getloadavg()[0]) > _QUIET:
        print(f"this machine is busy (load {load:.1f}): ratios will be off, times more so", file=sys.stderr)
    masking = against_aes(PARAMETERS)
    compared = {size.silos: against_flower(size, PARAMETERS) for size in SIZES}
    rounds = whole_rounds()
    grown = [] if options.quick else [growth.grow(*size) for size in growth.SIZES]
    if options.json:
        print(json.dumps(figures(compared, masking, rounds, grown)))
    else:
        show(compared, masking, rounds, grown)


if __name__ == "__main__":
    main()
