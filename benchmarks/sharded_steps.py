"""How far every sharded training step is from the unsharded one, for the record.

    python -m benchmarks.sharded_steps    # the meshes that are missing; a CPU, 40 minutes in all

Runs `tests/train/test_sharded_step.py -m long`, a mesh at a time, and keeps what its report says of
each case: the largest difference of gradients, relative to the largest value of the leaf, and of
updated parameters and their average.
"""

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from tests.train.sharded import MESHES

RESULTS = Path(__file__).parent / "results" / "sharded_steps.json"
TEST = "tests/train/test_sharded_step.py"


def main() -> None:
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for mesh in MESHES:
        if not any(case.startswith(mesh) for case in found):
            found |= run(mesh)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def run(mesh: str) -> dict[str, dict[str, str]]:
    """Case -> what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", TEST, "-m", "long", "-k", mesh]
        # The default family of reports has no properties. A case that fails is in the report.
        subprocess.run([*command, "-o", "junit_family=xunit1", f"--junitxml={report}"])
        return {case.get("name").split("[")[1].rstrip("]"): _read(case) for case in _cases(report)}


def _cases(report: Path) -> list[ET.Element]:
    return list(ET.parse(report).iter("testcase"))


def _read(case: ET.Element) -> dict[str, str]:
    failed = case.find("failure") is not None or case.find("error") is not None
    told = {one.get("name"): one.get("value") for one in case.iter("property")}
    return {"outcome": "failed" if failed else "passed", "seconds": case.get("time"), **told}


def table(found: dict[str, dict[str, str]]) -> str:
    """The largest differences of each mesh as Markdown."""
    lines = ["| mesh | cases | passed | gradients | parameters | average |", "|---" * 6 + "|"]
    for mesh in MESHES:
        cases = [one for case, one in found.items() if case.startswith(mesh)]
        passed = [one for one in cases if one["outcome"] == "passed"]
        worst = [
            max((one[tree] for one in passed), key=float, default="")
            for tree in ("gradients", "params", "ema")
        ]
        lines.append("| " + " | ".join([mesh, str(len(cases)), str(len(passed)), *worst]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
