"""Look up advisories on every pin of constraints.txt with pip-audit.

The exit code is 1 where there is an advisory. Where the package index has none (a mirror, a machine
without a network), the output counts and names the pins that were not looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

PIP_AUDIT = ("pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json")


def main(requirements: str) -> int:
    command = [sys.executable, "-m", *PIP_AUDIT, "--requirement", requirements]
    found = subprocess.run(command, capture_output=True, text=True)
    try:
        pins = json.loads(found.stdout)["dependencies"]
    except (ValueError, KeyError):
        last = (found.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
        print(f"advisories: no pin of {requirements} was looked up: {last}")
        return 0 if "ConnectionError" in found.stderr else 1
    return report(pins)


def report(pins: Sequence[Mapping[str, Any]]) -> int:
    """Print the advisories that pip-audit found on ``pins``; return the exit code."""
    skipped = [pin["name"] for pin in pins if "skip_reason" in pin]
    print(f"advisories: {len(pins) - len(skipped)} of {len(pins)} pins were looked up")
    if skipped:
        print(f"  not looked up, the index does not know them: {', '.join(skipped[:5])}", end="")
        print(f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
    known = [(pin, advisory) for pin in pins for advisory in pin.get("vulns", ())]
    for pin, advisory in known:
        fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
        print(f"  {pin['name']} {pin['version']}: {advisory['id']}, fixed in {fixed}")
    return 1 if known else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
