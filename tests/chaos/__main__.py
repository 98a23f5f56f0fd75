"""Kill and pause each part of a running server under load, and count what its callers saw.

    python -m tests.chaos                                    all of it: about 15 minutes on 2 cores
    python -m tests.chaos --parts unet redis --kinds kill    some
    python -m tests.chaos --seed 7                           other prompts, other moments

Starts `sdxs serve` on Ray with the emoji model and its ControlNet, one replica of each part, and a Redis and an S3 server of its
own. Four callers ask for images with 3 or 20 seconds to wait, one stream draws frames, two callers hand in jobs with ids of their
own, single and in batches, some twice. Then one part after the other is killed (SIGKILL; Redis and S3 are started again after
2 s, on their data) and paused for 10 s (SIGSTOP).

What must hold: each interactive call gets its image, right to 1/255 against the same bundle in this process, or UNAVAILABLE,
DEADLINE_EXCEEDED or RESOURCE_EXHAUSTED, within its deadline and a second; streams go on; each accepted job ends SUCCEEDED, once,
with exactly its images in the store, and these right. Anything else is listed, and the exit code is 1. Rows go to
benchmarks/results/chaos.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine, write
from services.settings import ServingSettings
from tests.chaos.load import Account, Judge, Load, Seen, account, wait_ended
from tests.chaos.parts import KINDS, PARTS, World, world

BEFORE_S, AFTER_S, RECOVERY_S, JOBS_S = 8.0, 8.0, 120.0, 180.0
DELAYED_S = 1.0
"""A call that takes longer has noticed."""
SETTINGS = {"SDXS_JOB_VISIBILITY_S": "10"}


@dataclass
class Phase:
    """One fault, and what was seen while it was there and until all was well again."""

    part: str
    kind: str
    seen: Seen
    began: float
    recovered: bool = True

    @property
    def noticed_s(self) -> float:
        """From the fault to the end of the last call that it failed or delayed; 0: there was none."""
        late = [end for begin, end, good in self.seen.calls if end >= self.began and (not good or end - begin > DELAYED_S)]
        return max(late, default=self.began) - self.began

    @property
    def job_s(self) -> float | None:
        """From the fault to the first end of a job handed in after it."""
        return min((job.ended - self.began for job in self.seen.jobs if job.at >= self.began and job.ended), default=None)

    def row(self, found: Account) -> dict[str, Any]:
        """Counted."""
        mine = {job.job_id for job in self.seen.jobs}

        def of(lines: Sequence[str]) -> int:
            return sum(any(job_id in line for job_id in mine) for line in lines)

        seen = self.seen
        return {
            "part": self.part, "fault": self.kind, "requests": seen.requests, "images": seen.images, "errors": dict(seen.errors),
            "frames": seen.frames, "dropped": dict(seen.dropped), "jobs": len(seen.jobs), "refused_jobs": dict(seen.refused),
            "lost": of(found.lost), "duplicates": of(found.duplicates), "wrong": len(seen.wrong) + of(found.wrong),
            "recovered": self.recovered, "noticed_s": _rounded(self.noticed_s), "job_s": _rounded(self.job_s),
        }  # fmt: skip


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


async def strike(here: World, load: Load, part: str, kind: str) -> Phase:
    """One fault, from a quiet moment to the next."""
    phase = Phase(part, kind, load.phase(), time.monotonic())
    if part:
        await asyncio.to_thread(here.strike, part, kind)
    over = time.monotonic()
    while True:
        await asyncio.sleep(0.5)
        await wait_ended(here.served.address, phase.seen.jobs, 0)
        image = any(good and begin >= over for begin, _, good in phase.seen.calls)
        job = any(job.at >= over and job.ended for job in phase.seen.jobs)
        since = time.monotonic() - over
        if (image and job and since > AFTER_S) or since > RECOVERY_S:
            phase.recovered = image and job
            return phase


async def run(faults: Sequence[tuple[str, str]], seed: int, console: Console) -> tuple[list[Phase], Account]:
    """All faults, one after the other."""
    console.print("drawing what the images must be")
    judge = Judge()
    judge.knows()
    with tempfile.TemporaryDirectory(prefix="sdxs-chaos-") as folder:
        console.print("starting Redis, S3 and `sdxs serve`")
        with world(Path(folder) / "world", SETTINGS, "--model", "emoji") as here:
            load = Load(here.served.address, judge, seed)
            load.start()
            phases = []
            for part, kind in [("", "none"), *faults]:
                phase = await strike(here, load, part, kind)
                phases.append(phase)
                console.print(_line(phase))
                for what, count in phase.seen.said.most_common(5):
                    console.print(f"  {count} x {what}", markup=False, style="dim")
                for what in phase.seen.wrong[:5]:
                    console.print(f"  {what}", markup=False, style="red")
            await load.stop()
            jobs = [job for phase in phases for job in phase.seen.jobs]
            console.print(f"{len(jobs)} jobs against the store")
            await wait_ended(here.served.address, jobs, JOBS_S)
            variables = {name.removeprefix("SDXS_").lower(): value for name, value in here.variables.items()}
            return phases, await account(here.served.address, jobs, judge, ServingSettings.model_validate(variables))


def _line(phase: Phase) -> str:
    seen = phase.seen
    errors = ", ".join(f"{code} {count}" for code, count in seen.errors.items()) or "no errors"
    back = "" if phase.recovered else f" NOT RECOVERED after {RECOVERY_S:g} s"
    return (
        f"{phase.kind} {phase.part}: {seen.images} images ({errors}), {seen.frames} frames, {len(seen.jobs)} jobs; "
        f"noticed for {phase.noticed_s:.1f} s, job after {phase.job_s or 0:.1f} s{back}"
    )


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For people."""
    shown = (
        "part",
        "fault",
        "requests",
        "images",
        "errors",
        "frames",
        "jobs",
        "lost",
        "duplicates",
        "wrong",
        "noticed_s",
        "job_s",
    )
    made = Table(*shown)
    for row in rows:
        cells = dict(row, errors=", ".join(f"{code} {count}" for code, count in row["errors"].items()))
        made.add_row(*(str(cells[name]) for name in shown))
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which parts; all of them if not given")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what happens to them")
    parser.add_argument("--seed", type=int, default=0, help="of the load")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    faults = [(part, kind) for kind in options.kinds for part in options.parts]
    phases, found = asyncio.run(run(faults, options.seed, console))
    rows = [phase.row(found) for phase in phases]
    wrong = [what for phase in phases for what in phase.seen.wrong] + found.lost + found.duplicates + found.wrong
    wrong += [f"{phase.kind} {phase.part}: not recovered" for phase in phases if not phase.recovered]
    console.print(table(rows))
    for what in wrong:
        console.print(what, style="red", markup=False)
    jobs = sum(row["jobs"] for row in rows)
    requests = sum(row["requests"] for row in rows)
    console.print(
        f"{requests} requests, {jobs} accepted jobs: {len(found.lost)} lost, {len(found.duplicates)} duplicates, "
        f"{len(wrong) - len(found.lost) - len(found.duplicates)} otherwise wrong"
    )
    if faults == [(part, kind) for kind in KINDS for part in PARTS]:
        console.print(str(write("chaos", [{**row, "machine": machine()} for row in rows])))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
