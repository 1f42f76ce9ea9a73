"""Hostile inputs for every door through which files of strangers come in.

    python -m tests.proof.fuzz --minutes 5 image yaml

For each door inputs are made by changing seeds, and changes of what reached new lines of ours or
made a new message are changed again: they are the corpus, which is kept. A child process reads
them, and is started again when it dies. What counts as found: an execution, a file written
elsewhere, the end of the interpreter, more than 10 s of work, more than 1 GB of memory (no input
is over 512 KB), and any exception but `UserError`.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.proof.mutate import mutate
from tests.proof.reader import ROOT, Door, Reader


@dataclass
class Report:
    """What a door withstood."""

    inputs: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    largest: int = 0
    corpus: int = 0

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        head = (
            f"{self.inputs} inputs ({kinds}), at most {self.slowest:.1f} s and "
            f"{self.largest >> 20} MB, corpus of {self.corpus}"
        )
        return "\n".join([head, *(f"  {n} x {what}" for what, n in self.faults.most_common())])


def fuzz(door: Door, seconds: float, folder: Path, seed: int, enough: int = 1 << 30) -> Report:
    """Try one door for a time.

    Args:
        door: What is tried.
        seconds: How long.
        folder: Where the corpus and what is found are kept.
        seed: Of everything random.
        enough: Kinds of faults after which it ends.
    """
    random, report = Random(seed), Report()
    kept, found = folder / "corpus", folder / "found"
    for place in (kept, found):
        place.mkdir(parents=True, exist_ok=True)
    waiting = [*door.seeds(), *(path.read_bytes() for path in sorted(kept.iterdir()))]
    corpus: list[bytes] = list(waiting)
    lines, ends = set[str](), set[str]()
    reader, end = Reader(door), time.monotonic() + seconds
    while time.monotonic() < end and len(report.faults) < enough:
        old = bool(waiting)
        data = waiting.pop() if old else mutate(random, random.choice(corpus), corpus)
        outcome = reader.read(data)
        report.inputs += 1
        report.kinds[outcome.kind] += 1
        report.slowest = max(report.slowest, outcome.seconds)
        report.largest = max(report.largest, outcome.memory)
        end_of_it = f"{outcome.kind}: {outcome.place}"
        new = not lines.issuperset(outcome.lines) or end_of_it not in ends
        lines.update(outcome.lines)
        ends.add(end_of_it)
        name = hashlib.sha256(data).hexdigest()[:16]
        if outcome.found:
            report.faults[end_of_it] += 1
            if report.faults[end_of_it] == 1:
                (found / f"{outcome.kind}-{name}").write_bytes(data)
                print(f"  {end_of_it} {outcome.text}", flush=True)
        elif new and not old:
            corpus.append(data)
            (kept / name).write_bytes(data)
    reader.close()
    report.corpus = len(corpus)
    return report


def main() -> int:
    """Try doors; 1 where something was found."""
    from tests.proof.doors import DOORS  # which imports all that is tried

    parser = argparse.ArgumentParser(description="Hostile inputs for every door.")
    parser.add_argument("doors", nargs="*", help=f"of {', '.join(DOORS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=5.0, help="for each door")
    parser.add_argument("--folder", type=Path, default=ROOT / ".proof", help="of the corpora")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--again", type=Path, help="read one input that was found, with its error")
    args = parser.parse_args()
    if args.again:
        with tempfile.TemporaryDirectory() as name:
            DOORS[args.doors[0]].opened(Path(name))(args.again.read_bytes())
        return 0
    print(f"seed {args.seed}")
    faults = 0
    for name in args.doors or DOORS:
        report = fuzz(DOORS[name], args.minutes * 60, args.folder / name, args.seed)
        print(f"{name}: {report}", flush=True)
        faults += sum(report.faults.values())
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
