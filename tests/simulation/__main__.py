"""`python -m tests.simulation`: many schedules, or one again.

python -m tests.simulation 10000            the schedules of the seeds 0 to 9,999, on all processors
python -m tests.simulation --seed 4711      one again, with all that happened in it
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter


def main() -> int:
    line = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    line.add_argument("schedules", nargs="?", type=int, default=10_000, help="how many (10000)")
    line.add_argument("--first", type=int, default=0, help="seed of the first (0)")
    line.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    line.add_argument("--seed", type=int, help="run this one again and print all that happens")
    given = line.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of a set is a die too
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])  # noqa: S606
    from tests.simulation.schedule import play

    if given.seed is not None:
        outcome = play(given.seed, verbose=True)
        print(f"seed {given.seed}: {outcome.problem or 'well'}")
        print(f"{outcome.operations} operations, {outcome.seconds:.2f} s")
        return int(outcome.problem is not None)
    began, faults, failed, operations = time.perf_counter(), Counter[str](), [], 0
    cpu = 0.0
    seeds = range(given.first, given.first + given.schedules)
    gc.collect()
    gc.freeze()  # what was imported, half a million objects, would be gone through again and again
    with multiprocessing.get_context("fork").Pool(given.jobs) as pool:
        for outcome in pool.imap_unordered(play_one, seeds, chunksize=10):
            seed, problem, kinds, count, took = outcome
            cpu += took
            faults.update(kinds)
            operations += count
            if problem is not None:
                failed.append(seed)
                print(f"seed {seed}: {problem}", flush=True)
    seconds = time.perf_counter() - began
    print(f"{given.schedules} schedules in {seconds:.0f} s ({cpu:.0f} s of processors)", end=", ")
    print(f"{operations} operations, {sum(faults.values())} faults")
    for kind, number in sorted(faults.items()):
        print(f"  {number:6} {kind}")
    print(f"{len(failed)} failed: {sorted(failed)[:50]}" if failed else "0 failed")
    return int(bool(failed))


def play_one(seed: int) -> tuple[int, str | None, Counter[str], int, float]:
    from tests.simulation.schedule import play

    outcome = play(seed)
    kinds = Counter[str]()
    for text, number in outcome.faults.items():
        kinds[kind_of(text)] += number
    return seed, outcome.problem, kinds, outcome.operations, outcome.seconds


def kind_of(text: str) -> str:
    """Return a fault without the names in it."""
    for word in ("SIGKILL", "frozen", "power", "full", "errno", "descriptors", "clock", "server", "answers", "actors",
                 "cut off", "flips", "taken away"):  # fmt: skip
        if word in text:
            return word
    return text


if __name__ == "__main__":
    sys.exit(main())
