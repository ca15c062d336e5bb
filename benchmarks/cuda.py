"""Everything that only a GPU can tell, within one lease: `hificl bench cuda --minutes 9`.

python -m benchmarks.cuda --minutes 9 --out FOLDER      # from the repository's root
python -m benchmarks.cuda --device cpu --minutes 1      # a rehearsal in tiny sizes: every item runs, no number counts
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import HificlError, InputError, nearest

DEVICE = "cuda"  # unless told otherwise
LINES = "cuda.jsonl"
NO_DEVICE = 4  # exit status of a process that finds no GPU
_LAST = 3.0  # seconds at the end for what is left to do here
_START = 20.0  # seconds until a further process measures anything
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Item:
    """Something that is checked or measured.

    Attributes:
        name: as the lines call it.
        seconds: what it takes on an H100, an estimate: it is not begun with less time left.
        call: module below `benchmarks.support`, and function, which is given the lease.
        arguments: further ones.
    """

    name: str
    seconds: float
    call: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """Return the seconds after which it is taken to hang."""
        return 90 + 3 * self.seconds


BACKBONES = (
    "idefics2-8b-base", "llava-interleave-7b", "llava-v1.6-mistral-7b", "llava-onevision-qwen2-7b", "qwen3-vl-8b",
    "idefics-9b",
)  # fmt: skip
_IDEFICS2, _LLAVA = {"name": "idefics2"}, {"name": "llava"}
ITEMS = (  # most worth first
    Item("ceilings", 5, "items:ceilings"),
    Item("exact-attention", 60, "exact:attention"),
    Item("exact-decoding", 6, "exact:decoding"),
    *(Item(f"exact-{name}", 12, "exact:training", {"backbone": name}) for name in BACKBONES),
    Item("whole-trials", 30, "exact:whole_trials"),
    Item("step-idefics2", 40, "items:step", _IDEFICS2),
    Item("fused-idefics2", 6, "items:fused", _IDEFICS2),
    Item("packs-idefics2", 30, "items:packs", _IDEFICS2),
    Item("decode-idefics2", 30, "items:decoding", _IDEFICS2),
    Item("exact-compiled", 50, "exact:compiled"),
    Item("exact-quantized", 25, "exact:quantized"),
    Item("quantized-idefics2", 50, "items:quantized", _IDEFICS2),
    Item("compiled-idefics2", 60, "items:compiled", _IDEFICS2),
    Item("reuse-idefics2", 5, "items:visual", _IDEFICS2),
    Item("step-llava", 40, "items:step", _LLAVA),
    Item("fused-llava", 6, "items:fused", _LLAVA),
    Item("packs-llava", 30, "items:packs", _LLAVA),
    Item("decode-llava", 30, "items:decoding", _LLAVA),
    Item("reuse-llava", 5, "items:visual", _LLAVA),
    Item("attention-of-a-token", 10, "items:one_token"),
    Item("compiled-llava", 60, "items:compiled", _LLAVA),
    Item("layers", 60, "items:layers"),
)


def run(
    device: str = DEVICE, *, minutes: float = 9.0, out: Path | str | None = None, items: Sequence[str] = ()
) -> dict[str, Any]:
    """Check exactness, then measure, on one GPU and within a number of minutes.

    Exactness: attention with virtual tokens over masks, forms, head sizes and grouped keys in fp32 and bf16; one
    training step of every method on tiny models of six architectures, alone and packed; compiled parts; cached
    decoding. Each is compared with fp64 on the CPU, ||x - reference|| / ||reference||, or with the same computation
    without what is checked. Then random Idefics2-8b and LLaVA-Interleave-7b at full size in bf16: `step_over_floor` is
    HiFICL's training step over the frozen decoder alone (forward, and backward to its input embeddings),
    `packed_over_sequential_K` the samples a second of K trials in one pass over those of one trial,
    `weight_read_over_decoded_token` the time to read all weights and the cache once, at a copy's measured rate, over
    what a decoded token takes; the rest is as in `step`, `decode`, `reuse` and `attention`. Items have the time that is
    left; what does not fit, and what fails, is named, and the others go on. A process that dies is replaced.

    Args:
        device: cuda; cpu rehearses all items in tiny sizes.
        minutes: from the start of this function to its end.
        out: folder of `cuda.jsonl`, to which a line is appended for each number as it comes; None: `runs/bench`.
        items: those that are wanted; none: all.

    Raises:
        InputError: no time, no such item, or no GPU.
    """
    until = time.time() + 60 * minutes - _LAST
    if not minutes > 0:
        raise InputError(f"{minutes} minutes", where="--minutes", way_out="Give a positive number")
    waiting = _wanted(items)
    lines = Path(out or "runs/bench") / LINES
    lines.parent.mkdir(parents=True, exist_ok=True)
    lines.write_text("", encoding="utf-8")
    while waiting:
        _work(device, lines, until, waiting)
        entries = read(lines)
        begun = {entry["item"] for entry in entries if "started" in entry or "skipped" in entry}
        rest = [item for item in waiting if item.name not in begun]
        if rest == waiting or time.time() + _START > until:  # none begun: the next process would begin none either
            break
        waiting = rest
    return summary(read(lines), minutes=minutes, items=[item.name for item in _wanted(items)])


def _wanted(items: Sequence[str]) -> list[Item]:
    names = [item.name for item in ITEMS]
    for name in items:
        if name not in names:
            raise InputError(f"no item '{name}'", where="--items", way_out=nearest(name, names))
    return [item for item in ITEMS if not items or item.name in items]


def _work(device: str, lines: Path, until: float, items: Sequence[Item]) -> None:
    """Let a process of its own do the items; end it when an item hangs or the time is over, and name what it was at."""
    command = [sys.executable, "-m", "benchmarks.support.lease", "--device", device, "--lines", str(lines)]
    command += ["--until", str(until), *(item.name for item in items)]
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(command, stdout=sys.stderr, env={**os.environ, "PYTHONPATH": path})
    limits = {item.name: item.limit for item in ITEMS}
    why = ""
    while process.poll() is None:
        item, since = _current(lines)
        if time.time() > until:
            why = "no time left"
        elif item is not None and time.time() - since > limits[item]:
            why = f"stopped after {limits[item]:.0f} s"
        if why:
            process.kill()
            process.wait()
            break
        time.sleep(0.1)
    if process.returncode == NO_DEVICE:
        raise InputError("there is no GPU that works", way_out="--device cpu rehearses everything in tiny sizes")
    item, _ = _current(lines)
    if item is not None:
        failed = why or f"its process ended with status {process.returncode}"
        entry = {"item": item, "part": "", "failed": failed, "traceback": []}
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n" + json.dumps({"item": item, "took": None}) + "\n")
        sys.stderr.write(f"FAILED {item}: {failed}\n")


def _current(lines: Path) -> tuple[str | None, float]:
    """Return the item that is being worked at, and since when."""
    item, since = None, 0.0
    for entry in read(lines):
        if "started" in entry:
            item, since = entry["item"], entry["started"]
        elif "took" in entry:
            item = None
    return item, since


def read(lines: Path) -> list[dict[str, Any]]:
    """Return the lines of a run, but for one that was cut off."""
    entries = []
    for line in lines.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def summary(entries: Sequence[Mapping[str, Any]], *, minutes: float, items: Sequence[str]) -> dict[str, Any]:
    """Return what the lines of a run say, in the form that `hificl bench --table` shows.

    Args:
        entries: the lines.
        minutes: that there were.
        items: that were wanted.
    """
    first: Mapping[str, Any] = next((entry for entry in entries if "machine" in entry), {})
    numbers = {entry["name"]: entry for entry in entries if "value" in entry}
    wrong = [
        {key: entry.get(key) for key in ("name", "value", "bound", "worst")}
        for entry in numbers.values() if not entry.get("right", True)
    ]  # fmt: skip
    begun = {entry["item"] for entry in entries if "started" in entry or ("skipped" in entry and "part" not in entry)}
    skipped = [f"{entry['item']} {entry.get('part', '')}".strip() for entry in entries if "skipped" in entry]
    return {
        "ratios": {name: entry["value"] for name, entry in numbers.items()},
        "spread": {name: entry["spread"] for name, entry in numbers.items()},
        "sizes": {"minutes": minutes, "items": list(items)},
        "checked": sum("right" in entry for entry in numbers.values()), "wrong": wrong,
        "failed": [f"{entry['item']} {entry['part']}: {entry['failed']}" for entry in entries if "failed" in entry],
        "skipped": skipped + [name for name in items if name not in begun],
        "seconds": {entry["item"]: entry["took"] for entry in entries if "took" in entry},
        "machine": first.get("machine", {}), "versions": first.get("versions", {}), "commit": first.get("commit"),
        "method": " ".join((run.__doc__ or "").split("Args:")[0].split()),
    }  # fmt: skip


def main() -> None:
    """Run the verb and print its JSON, which is also written beside the lines."""
    parser = argparse.ArgumentParser(description=" ".join((run.__doc__ or "").split("Args:")[0].split()))
    parser.add_argument("--device", choices=["cpu", "cuda"], default=DEVICE)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the lines and of the summary")
    parser.add_argument("--items", nargs="*", default=[], help="those that are wanted; none: all")
    given = parser.parse_args()
    try:
        result = run(given.device, minutes=given.minutes, out=given.out, items=given.items)
    except HificlError as error:
        sys.exit(f"error: {error}")
    text = json.dumps(result, indent=1, sort_keys=True) + "\n"
    (given.out / f"cuda-{given.device}.json").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
