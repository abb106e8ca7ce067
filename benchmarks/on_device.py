"""All that needs an NVIDIA GPU, in one command and under ten minutes.

    python -m benchmarks.on_device                # into benchmarks/results/<device>/
    python -m benchmarks.on_device --steps against,layers --minutes 20     # some, for longer
    python -m benchmarks.on_device --dry-run      # the same code, small, on whatever is here

Steps run one after the other, what matters most first, each in a process of its own, so that a
crash or a hang of one costs the others nothing. Each appends a line to ``<step>.jsonl`` as soon
as it knows something: a run that is cut short leaves what it has measured. A step exits with 1
where something is wrong, and so does the whole.

What the steps do is in `benchmarks.device_checks` and `benchmarks.device_timing`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Name, seconds of ten minutes, and how many processes share the work. Only what is timed needs the
# device to itself.
STEPS = {
    "versions": (25, 1),
    "negative_start": (30, 1),
    "correctness": (110, 6),
    "goals": (75, 1),
    "repeatability": (35, 1),
    "sanitizer": (45, 1),
    "tuning": (70, 1),
    "against": (80, 1),
    "layers": (70, 1),
    "pytorch": (35, 1),
}


MINUTES = 9.0  # for all of them, unless told otherwise


class Log:
    """Lines of JSON, each on the disk before the next is measured."""

    def __init__(self, folder: Path, step: str, seconds: float, shard: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / (f"{step}.jsonl" if shard == 0 else f"{step}.{shard}.jsonl")
        self.path.unlink(missing_ok=True)
        self.end = time.monotonic() + seconds
        self.failures = 0

    def write(self, ok: bool | None = None, **fields) -> None:
        """Adds a line. ``ok`` False makes the step, and so the whole, exit with 1."""
        if ok is not None:
            fields["ok"] = ok
            self.failures += not ok
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields, default=str) + "\n")
        told = " ".join(f"{k}={_short(v)}" for k, v in fields.items())
        print(f"  {told}", flush=True)

    def left(self) -> float:
        """Seconds until the step has to end."""
        return self.end - time.monotonic()

    def out_of_time(self, next_one: str) -> bool:
        """Whether there is no time for more; writes down what is left out."""
        if self.left() > 0:
            return False
        self.write(cut_short=next_one)
        return True


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:300]


def run_step(args) -> int:
    """One step, in this process."""
    from benchmarks import device_checks, device_timing

    log = Log(args.out, args.step, args.seconds or STEPS[args.step][0], args.shard)
    if args.step == "correctness":
        device_checks.correctness(log, args.dry_run, args.shard, args.shards, args.only)
    else:
        module = device_checks if hasattr(device_checks, args.step) else device_timing
        getattr(module, args.step)(log, args.dry_run)
    return min(1, log.failures)


def run_all(args) -> int:
    """Every step that is asked for, each in a process or several."""
    out = args.out or RESULTS / _device_folder(args.dry_run)
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    # Several processes share the device, and nobody's must find its memory taken.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    worst, report, waiting = 0, out / "summary.json", list(args.steps)
    summary = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    while waiting:
        left = end - time.monotonic()
        # What one step does not need is the others'.
        share = left / sum(STEPS[step][0] for step in waiting)
        step = waiting.pop(0)
        seconds, processes = STEPS[step][0] * share, 1 if args.dry_run else STEPS[step][1]
        start = time.monotonic()
        for stale in out.glob(f"{step}.*jsonl"):
            stale.unlink()
        if left < 10:
            summary[step] = "no time left"
            report.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            continue
        print(f"{step} (at most {seconds:.0f} s)", flush=True)
        command = [
            sys.executable, "-m", "benchmarks.on_device", "--step", step, "--out", str(out),
            "--seconds", str(seconds), *(["--dry-run"] if args.dry_run else []),
        ]  # fmt: skip
        running = [
            subprocess.Popen(
                [*command, "--shard", str(i), "--shards", str(processes)], env=environment
            )
            for i in range(processes)
        ]
        codes = [_wait(process, start + seconds + 20) for process in running]
        _join_shards(out, step)
        summary[step] = {"exit": max(codes, key=abs), "seconds": round(time.monotonic() - start, 1)}
        worst = max(worst, *map(abs, codes))
        report.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))
    return min(1, worst)


def _join_shards(out: Path, step: str) -> None:
    """What the other processes of a step wrote goes to the end of the first one's file."""
    for shard in sorted(out.glob(f"{step}.*.jsonl")):
        with (out / f"{step}.jsonl").open("a", encoding="utf-8") as whole:
            whole.write(shard.read_text(encoding="utf-8"))
        shard.unlink()


def _wait(process: subprocess.Popen, deadline: float) -> int:
    try:
        return process.wait(max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return 124


def _device_folder(dry: bool) -> str:
    """As ``nvidia-h200``. Asked of a process of its own, so that this one leaves the GPU alone."""
    if dry:
        return "dry-run"
    ask = "import jax; print(jax.devices()[0].device_kind)"
    kind = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    return re.sub("[^a-z0-9]+", "-", kind.lower()).strip("-")


def _steps(names: str) -> list[str]:
    found = names.split(",")
    if unknown := set(found) - STEPS.keys():
        raise argparse.ArgumentTypeError(f"there is no step {', '.join(sorted(unknown))}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.on_device", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all steps together")
    parser.add_argument(
        "--steps", type=_steps, default=list(STEPS), metavar="NAMES",
        help=f"only these, with commas: {', '.join(STEPS)}",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="small, with XLA in Triton's place")
    parser.add_argument("--step", choices=STEPS, help="only this step, in this process")
    parser.add_argument("--only", default="", help="names of cases for the step correctness")
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--shard", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step and not args.out:
        parser.error("--step needs --out")
    return run_step(args) if args.step else run_all(args)


if __name__ == "__main__":
    sys.exit(main())
