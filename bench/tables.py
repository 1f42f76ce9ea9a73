"""`python -m bench.tables`: write the documents' tables of speed and accuracy from kept results.

``--keep FOLDER`` first takes the results and configs of a `bench.gpu` run into the repository. Of
each device the newest report counts. What no GPU has measured is said to be unmeasured.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean

import torch

from bench import accuracy
from bench.peers import KEPT
from bench.plots import save_pictures
from bench.results import OURS, RESULTS, ROOT, Report, Row, environment, left_out, verdict
from yolov7.variants import VARIANTS

DOCUMENTS = ROOT / "docs"  # accuracy.md and speed.md
NETWORKS = ("engine", "family")  # suites with a row for each variant
MANY = 16  # comparisons of a suite that get a line each
UNLIKE = ("pipeline", "import", "first_detection")  # their baseline is a yardstick, other work
UNMEASURED = (
    "**On a GPU nothing has been measured yet**, so no speed of the kernels or of the engine is "
    "claimed. What their docstrings expect follows from counted bytes and operations; "
    "`python -m bench.gpu` is there to measure it."
)


def newest(folder: Path = RESULTS) -> list[Report]:
    """The last report of each device, GPUs first."""
    devices = [path for path in sorted(folder.glob("*")) if path.is_dir()]
    reports = [Report.load(max(device.glob("*.json"))) for device in devices]
    return sorted(reports, key=lambda report: not on_gpu(report))


def on_gpu(report: Report) -> bool:
    """Whether a GPU was measured."""
    return "cuda" in report.environment


def speed(reports: Sequence[Report]) -> list[str]:
    """Lines of the section on speed."""
    lines = []
    if not any(map(on_gpu, reports)):
        lines += [UNMEASURED, ""]
    for report in reports:
        lines += [*_heading(report), ""]
        if on_gpu(report):
            lines += [*_variant_table(report), ""]
        lines += [*_comparison_table(report), ""]
        if missing := left_out(report.rows):
            lines += [*(f"- {line}" for line in missing), ""]
    return lines[:-1]


def peers(report: Report) -> list[str]:
    """Lines of the table of runtimes: one for each, a column for each variant."""
    rows = [row for row in report.rows if not row.missing and "neighbour" not in row.case]
    cases = list(dict.fromkeys(row.case for row in rows))
    known = report.environment
    versions = ", ".join(f"{name} {value}" for name, value in known["versions"].items())
    lines = [
        f"**{known['device']}**, {known['threads']} threads, {versions}; commit {known['commit']}, "
        f"{known['date'][:10]}. Median ms of a forward, each runtime in a process of its own.",
        "",
        f"| | {' | '.join(cases)} |",
        "|---|" + "---|" * len(cases),
    ]
    for body in dict.fromkeys(row.body for row in rows):
        found = [report.find("peers", case, body) for case in cases]
        lines.append(f"| {body} | {' | '.join(f'{r.p50_ms:.4g}' if r else '' for r in found)} |")
    return lines


def _heading(report: Report) -> Iterator[str]:
    known = report.environment
    versions = ", ".join(f"{name} {value}" for name, value in known["versions"].items())
    changed = " with changes" if known["changed"] else ""
    yield (
        f"**{known['device']}**, {known['cores']} CPU cores, {versions}; commit "
        f"{known['commit']}{changed}, {known['date'][:10]}. Ratio: the baseline's time over ours, "
        f"medians of turns taken alternately; losses are shown too."
    )
    ceilings = ", ".join(f"{name} {value:g}" for name, value in report.ceilings.items())
    yield f"Ceilings of this run: {ceilings}."
    if report.checks:
        wrong = len(report.checks["wrong"])
        yield (
            f"{report.checks['configs']} configs of {report.checks['layers']} layers were compared "
            f"with fp32 on the device first; {wrong or 'none'} of them differed."
        )


def _variant_table(report: Report) -> Iterator[str]:
    """The network of each variant, fp16."""
    yield "| network, fp16 | p50 ms, batch 1 | p99 | images/s, batch 32 | of the ceiling | eager |"
    yield "|---|---|---|---|---|---|"
    for variant in VARIANTS:
        one, many = (_network(report, f"{variant}, batch {batch}") for batch in (1, 32))
        if one is None or many is None:
            continue
        eager = _network(report, f"{variant}, batch 32", "eager")
        beside = f"{eager.images_per_s:.0f} images/s" if eager else ""
        yield (
            f"| {variant} | {one.p50_ms:.3f} | {one.p99_ms:.3f} | {many.images_per_s:.0f} "
            f"| {many.ceiling_percent:.0f} % | {beside} |"
        )


def _network(report: Report, case: str, body: str = OURS) -> Row | None:
    return next((row for suite in NETWORKS if (row := report.find(suite, case, body))), None)


def _comparison_table(report: Report) -> Iterator[str]:
    """A line for each baseline; of suites with many cases one for each batch size."""
    yield "| benchmark | ours ms | baseline | its ms | ratio | |"
    yield "|---|---|---|---|---|---|"
    present = [row for row in report.rows if not row.missing]
    ours = {(row.suite, row.case): row for row in present if row.body == OURS}
    pairs = [
        (ours[row.suite, row.case], row)
        for row in present
        if row.body != OURS and row.suite not in UNLIKE and (row.suite, row.case) in ours
    ]
    for suite in dict.fromkeys(row.suite for row in present):
        compared = [pair for pair in pairs if pair[0].suite == suite]
        alone = [row for row in ours.values() if row.suite == suite]
        alone = [row for row in alone if row not in [mine for mine, _ in compared]]
        if len(compared) > MANY:
            yield from _means(compared)
        else:
            yield from (_line(mine, theirs) for mine, theirs in compared)
        yield from (f"| {_name(mine)} | {mine.p50_ms:.4g} | | | | |" for mine in alone)


def _name(row: Row) -> str:
    return f"{row.suite} {row.case}".replace("_", " ").strip()


def _line(mine: Row, theirs: Row) -> str:
    ratio = theirs.p50_ms / mine.p50_ms
    return (
        f"| {_name(mine)} | {mine.p50_ms:.4g} | {theirs.body} | {theirs.p50_ms:.4g} | {ratio:.2f} "
        f"| {verdict(ratio)} |"
    )


def _means(pairs: Sequence[tuple[Row, Row]]) -> Iterator[str]:
    """Geometric means over the cases of a suite that begin alike, wins and losses counted."""
    groups: dict[tuple[str, str], list[tuple[Row, Row]]] = {}
    for mine, theirs in pairs:
        groups.setdefault((mine.case.partition(",")[0], theirs.body), []).append((mine, theirs))
    for (start, body), members in groups.items():
        ours, other = (geometric_mean(pair[i].p50_ms for pair in members) for i in (0, 1))
        verdicts = [verdict(b.p50_ms / a.p50_ms) for a, b in members]
        counted = ", ".join(f"{verdicts.count(v)} {v}" for v in ("win", "even", "loss"))
        name = f"{members[0][0].suite} {start}, mean of {len(members)}".replace("_", " ")
        yield f"| {name} | {ours:.4g} | {body} | {other:.4g} | {other / ours:.2f} | {counted} |"


def keep(folder: Path) -> Path:
    """Take a run into the repository: its report, its pictures, its configs."""
    report = Report.load(folder / "results.json")
    if report.environment["commit"] == "unknown":  # a checkout without its history: this one's
        here = environment(torch.device("cpu"))
        report.environment |= {name: here[name] for name in ("commit", "changed")}
    path = report.save()
    save_pictures(Report.load(path), path.parent)
    if (folder / "configs").exists():
        shutil.copytree(folder / "configs", ROOT / "kernels" / "configs", dirs_exist_ok=True)
    return path


def rewritten(text: str, name: str, lines: Sequence[str]) -> str:
    """A document's text with the lines between the markers of its table written anew.

    Raises:
        ValueError: The markers are missing.
    """
    start = f"<!-- {name}: written by python -m bench.tables -->"
    end = f"<!-- end of {name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the document has no lines {start} and {end}")
    return before + "\n".join([start, "", *lines, "", end]) + after


def document(name: str) -> Path:
    """Where a table stands."""
    return DOCUMENTS / ("accuracy.md" if name == "accuracy" else "speed.md")


def tables() -> dict[str, list[str]]:
    """The lines of every table that is written from kept results, by its name."""
    return {
        "accuracy": list(accuracy.table(accuracy.kept())),
        "speed": speed(newest()),
        "peers": peers(Report.load(KEPT)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of a bench.gpu run")
    options = parser.parse_args(arguments)
    if options.keep:
        print("kept:", keep(options.keep))
    for name, lines in tables().items():
        path = document(name)
        path.write_text(rewritten(path.read_text(), name, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
