"""Run the golden and property tests and all claims, and write the project's records. For maintainers.

    make evidence                    # all methods; TOKENRY_DATA names the folder of the larger data sets
    python scripts/record_evidence.py ems affnet
    python scripts/record_evidence.py ppd --claims lossless memory      # these two, and no tests

A golden record per stored case (its value: the largest error, in units of the output's scale), one ``properties``
record per method, one record per claim. Side-by-side times against the authors' code come from the benchmarks:
``--speed FILE`` takes their JSON lines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from tokenry.catalog import cards
from tokenry.claims import verify
from tokenry.evidence import Record, save_project


def test_records(slugs: set[str]) -> list[Record]:
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "outcomes.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--evidence", str(lines), "tests"]
        subprocess.run(command, check=False)
        outcomes = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    golden: dict[tuple[str, str], list[dict]] = defaultdict(list)
    properties: dict[str, list[dict]] = defaultdict(list)
    for outcome in outcomes:
        if outcome["slug"] not in slugs or outcome["outcome"] == "skipped":
            continue
        if outcome["check"] == "golden":
            used = {name: worst for name, worst in outcome["cases"].items() if name.startswith(outcome["slug"] + "/")}
            for name, worst in used.items():
                golden[outcome["slug"], name.split("/")[1]].append(outcome | {"error": worst})
        else:
            properties[outcome["slug"]].append(outcome)
    records = []
    for (slug, case), runs in golden.items():
        errors = [run["error"] for run in runs if run["error"] is not None]
        passed = all(run["outcome"] == "passed" for run in runs)
        records.append(
            Record(
                slug=slug, check="golden", id=case, passed=passed, value=max(errors, default=None), unit="of the output's scale",
                sentence="equals the authors' output" if passed else "differs from the authors' output",
                seconds=round(sum(run["seconds"] for run in runs), 2),
            )
        )  # fmt: skip
    for slug, runs in properties.items():
        good = sum(run["outcome"] == "passed" for run in runs)
        records.append(
            Record(
                slug=slug, check="properties", id="properties", passed=good == len(runs), value=good, unit="tests",
                sentence=f"{good} of {len(runs)} property and contract tests pass", seconds=round(sum(r["seconds"] for r in runs), 2),
            )
        )  # fmt: skip
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slugs", nargs="*")
    parser.add_argument("--speed", type=Path, nargs="*", default=[], help="JSON lines of side-by-side times")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-claims", action="store_true")
    parser.add_argument("--claims", nargs="+", metavar="ID", help="run only these claims, and no tests")
    parser.add_argument("--work", type=Path, default=Path("build/evidence"), help="unfinished claims go on from here")
    args = parser.parse_args()
    slugs = set(args.slugs or cards())
    if not (args.skip_tests or args.claims):
        save_project(test_records(slugs))
    speed = [Record.model_validate_json(line) for path in args.speed for line in path.read_text("utf-8").splitlines()]
    save_project(record for record in speed if record.slug in slugs)
    failed = 0
    for outcome in () if args.skip_claims else verify(sorted(slugs), claims=args.claims, folder=args.work):
        print(f"{outcome.slug}/{outcome.claim.id}: {outcome.sentence}", flush=True)
        if outcome.record is not None:
            save_project([outcome.record])
        failed += outcome.failed
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
