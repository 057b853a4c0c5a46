"""Run experiments and put their tables into docs/results.md: `python tools/write_results.py NAME... [--workers 2]`.

NAME is a file of benchmarks/experiments, without `.yaml`. Finished cells are kept in results/NAME, as
`fedclip-agg simulate` keeps them. A table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
PAGE = HOME / "docs" / "results.md"
EXPERIMENTS = HOME / "benchmarks" / "experiments"


def with_table(page: str, name: str, table: str) -> str:
    """The page with `table` in the place of the one called `name`.

    Raises:
        ValueError: the page has no such place.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    found, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{table}\n{end}", page, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{PAGE.name} has {count} places {begin.strip()}; write one, and {end} below it")
    return found


def run(name: str, workers: int) -> str:
    """The experiment's table in Markdown, without its heading."""
    out = HOME / "results" / name
    program = Path(sys.executable).parent / "fedclip-agg"
    experiment = EXPERIMENTS / f"{name}.yaml"
    subprocess.run(  # noqa: S603 - this package's own program
        [program, "simulate", experiment, "--out", out, "--workers", str(workers)], check=True
    )
    return (out / "table.md").read_text("utf-8").split("\n", 2)[2]


def main() -> None:
    """Read the command line, run, and write the page after each experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(path.stem for path in EXPERIMENTS.glob("*.yaml")))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    for name in options.names:
        table = run(name, options.workers)
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), name, table), "utf-8")


if __name__ == "__main__":
    main()
