"""Random runs are killed, damaged and starved, and must come to the same results.

    python -m experiments.soak --out=DIR [--minutes=60] [--jobs=2] [--seed=0]
        [--runs=500] [--mistakes=500] [--only=runs:17]

There are two phases. In `mistakes`, each case is one bad input: a wrong value of an
option, or a damaged file. It must end with one message and exit code 2, and nothing may
be written. In `runs`, each case is a random config. It runs once in peace, and once
more while it is killed, while its files are damaged or its disk is full, or while
other processes start the same run; the results must be equal bit by bit.

Everything is drawn from the seed, except the moments of signals. DIR/cases has a record
of every case, so the same command goes on with a soak that was interrupted, and
--only=PHASE:NUMBER repeats one case. The files of a case with a failure stay in
DIR/work. DIR/figures.json and DIR/table.md are written again every minute. The exit
code is 1 if anything was wrong.
"""

import argparse
import os
import sys
import time
from pathlib import Path


def main() -> int:
    """Does the cases that are left, and writes the figures."""
    given = _parse()
    out = given.out.resolve()
    for folder in ("cases", "work", "cache"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    _set_environment(out)
    # The environment must be set before JAX is imported.
    from experiments.soak import _figures, _schedule

    command = "python -m experiments.soak " + " ".join(sys.argv[1:])
    began = time.monotonic()
    plan = _schedule.plan(given.mistakes, given.runs, given.only)
    deadline = began + 60 * given.minutes
    n_left = _schedule.work_off(plan, out, given.seed, given.jobs, deadline, command)
    found = _figures.write(out, given.seed, command)
    print(_figures.table(found))
    if n_left:
        print(f"{n_left} cases are left; the same command goes on")
    for record in found["wrong"]:
        name = f"{record['phase']}:{record['number']}"
        print(f"\n{name} (python -m experiments.soak --out=DIR --only={name} ")
        print(f"    --seed={given.seed}):")
        for failure in record["failures"]:
            print(f"    {failure['kind']}: {failure['what']}")
    return 1 if found["wrong"] else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder of the soak"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="the longest time")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--seed", type=int, default=0, help="the seed of all draws")
    parser.add_argument("--runs", type=int, default=500, help="random configs")
    parser.add_argument("--mistakes", type=int, default=600, help="bad inputs")
    parser.add_argument("--only", default="", help="one case, PHASE:NUMBER")
    return parser.parse_args()


def _set_environment(out: Path) -> None:
    """Lets all children compile quickly, and share what they have compiled."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        JAX_COMPILATION_CACHE_DIR=str(out / "cache" / "xla"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        XDG_CACHE_HOME=str(out / "cache"),
    )


if __name__ == "__main__":
    sys.exit(main())
