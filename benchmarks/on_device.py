"""All that needs an NVIDIA GPU, in one command and under ten minutes.

    python -m benchmarks.on_device                # into benchmarks/results/<device>/
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

RESULTS = Path(__file__).parent / "results"

# Name, seconds at most, and how many processes share the work. Only what is timed needs the
# device to itself. All seconds together are less than ten minutes.
STEPS = {
    "versions": (25, 1),
    "negative_start": (30, 1),
    "correctness": (110, 6),
    "goals": (120, 1),
    "pytorch": (40, 1),
    "repeatability": (35, 1),
    "tuning": (80, 1),
    "layers": (70, 1),
    "sanitizer": (50, 1),
}


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


def commit() -> str:
    git = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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
    """Every step, each in a process or several."""
    out = args.out or RESULTS / _device_folder(args.dry_run)
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    # Several processes share the device, and nobody's must find its memory taken.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    worst, summary = 0, {}
    for step, (seconds, processes) in STEPS.items():
        left = end - time.monotonic()
        if left < 10:
            summary[step] = "no time left"
            continue
        seconds, start = min(seconds, left), time.monotonic()
        if args.dry_run:
            processes = 1
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
        summary[step] = {"exit": max(codes, key=abs), "seconds": round(time.monotonic() - start, 1)}
        worst = max(worst, *map(abs, codes))
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))
    return min(1, worst)


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.on_device", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together")
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
