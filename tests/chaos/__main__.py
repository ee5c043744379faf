"""`python -m tests.chaos 1-20`: trials by seed, one after the other, each with its report. Ends with 1 when anything
was violated; what such a trial has left is kept."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.trial import Plan, try_out


def seeds_of(text: str) -> list[int]:
    """`3`, `1-20` or `1-3,8`."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


async def _one(plan: Plan, limit_s: float) -> bool:
    """Whether everything held."""
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{plan.seed}-"))
    try:
        async with asyncio.timeout(limit_s):
            report = await try_out(plan, folder)
    except TimeoutError:
        print(f"seed {plan.seed}, {plan.shape}: not over after {limit_s:.0f} s; see {folder}", flush=True)
        return False
    print(report, flush=True)
    if report.violations:
        print(f"  left:       {folder}", flush=True)
        return False
    shutil.rmtree(folder)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("seeds", type=seeds_of, help="such as 3, 1-20 or 1-3,8")
    parser.add_argument("--shape", choices=["cluster", "laptop"], action="append", help="both, unless named")
    parser.add_argument("--chaos-s", type=float, default=Plan(0).chaos_s, help="how long the monkey plays")
    parser.add_argument("--apis", type=int, default=Plan(0).apis)
    parser.add_argument("--workers", type=int, default=Plan(0).workers)
    parser.add_argument("--limit-s", type=float, default=300, help="for one trial")
    options = parser.parse_args()
    good = True
    for seed in options.seeds:
        for shape in options.shape or ["cluster", "laptop"]:
            plan = Plan(seed, shape, options.chaos_s, options.apis, options.workers)
            good = asyncio.run(_one(plan, options.limit_s)) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
