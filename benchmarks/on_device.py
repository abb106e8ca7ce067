"""All that needs an NVIDIA GPU, in one command and under ten minutes.

    python -m benchmarks.on_device                # into benchmarks/results/<device>/
    python -m benchmarks.on_device --bundle results.tgz    # all that is left, in one file as well
    python -m benchmarks.on_device --steps against,layers  # some, each for longer
    python -m benchmarks.on_device --steps layers --from 9 # on from where it came to, as it said
    python -m benchmarks.on_device --steps drawn  # layers at random, as many as there is time for
    python -m benchmarks.on_device --dry-run      # the same code, small, on whatever is here

Steps run one after the other, what matters most first, each in a process of its own, so that a
crash or a hang of one costs the others nothing. Each appends a line to ``<step>.jsonl`` as soon
as it knows something, and a later line with the same ``item`` replaces it: a run that is cut short
leaves what it has measured. Where the process of a
step dies, another goes on after the item that killed it. A step exits with 1 where something is
wrong, and so does the whole; what was wrong, and the goals, are told once more at the end.

A machine may be lent for some minutes only, and be taken back with what lies on it. The bundle is
whole at any time, and seconds old. Unpack it into benchmarks/results/ before the next run: that
goes on with what is there, and finds the tiles that were tuned. Where the files travel without
their history, the environment variable BENCHMARKS_COMMIT tells the commit.

What the steps do is in `benchmarks.device_checks` and `benchmarks.device_timing`.
"""

import argparse
import functools
import importlib.util
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Name, seconds of ten minutes, and how many processes share the work. Only what is timed needs the
# device to itself; those that tune take turns.
STEPS = {
    "versions": (25, 1),
    "negative_start": (30, 1),
    "correctness": (110, 14),
    "goals": (75, 1),
    "repeatability": (30, 1),
    "sanitizer": (70, 1),
    "tuning": (90, 14),
    "against": (60, 1),
    "layers": (50, 1),
    "pytorch": (30, 1),
    "kernels": (30, 1),
    "formulations": (30, 1),
    "drawn": (500, 1),
}
# Steps that take all the time there is, and run only where they are asked for.
ASKED_FOR = ("drawn",)

MINUTES = 9.0  # for all of them, unless told otherwise
GRACE = 20  # seconds after its end at which a step is stopped
REAPED = 10  # seconds for one that was killed to be gone
# Seconds after which an item of a step hangs, where none takes nearly as long.
STUCK = {"correctness": 60, "goals": 60, "repeatability": 60}
RENEWED = 20  # seconds after which the bundle is made anew while a step goes on
DIED = 3  # exit status of a process that another may take over from; so are those of signals


class Log:
    """Lines of JSON, each on the disk before the next is measured.

    Attributes:
      item: the number of the one that `each` is at.

    Args:
      first: the first item of `each` that is still to do: others were begun by a process that
        has died or had no more time, whose lines stay.
    """

    def __init__(self, folder: Path, step: str, seconds: float, shard: int = 0, first: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / _name(step, shard)
        if not first:
            self.path.unlink(missing_ok=True)
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.failures = 0
        self.first = self.item = first
        self.whole = True  # nothing was left out for want of time

    def write(self, ok: bool | None = None, **fields) -> None:
        """Adds a line. ``ok`` False makes the step, and so the whole, exit with 1."""
        if ok is not None:
            fields["ok"] = ok
            self.failures += not ok
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields, default=str) + "\n")
        told = " ".join(f"{k}={_short(v)}" for k, v in fields.items())
        print(f"  {time.monotonic() - self.start:.0f} s: {told}", flush=True)

    def each[T](self, items: Iterable[T], name: Callable[[T], str] = str) -> Iterator[T]:
        """The items, while there is time; after a failure only if the device still answers.

        How far it is stands beside the lines, for a process that takes over.
        """
        for i, item in enumerate(items):
            if i < self.first:
                continue
            self.item = i
            if self.out_of_time():
                return self.write(cut_short=name(item))
            _reached(self.path).write_text(f"{i + 1} {name(item)}", encoding="utf-8")
            before = self.failures
            yield item
            if self.failures > before:
                _ask_device()

    def left(self) -> float:
        """Seconds until the step has to end."""
        return self.end - time.monotonic()

    def out_of_time(self) -> bool:
        """Whether there is no time for more; then another run has to begin with this item."""
        if self.left() > 0:
            return False
        if self.whole:
            _reached(self.path).write_text(str(self.item), encoding="utf-8")
        self.whole = False
        return True


def lines_of(file: Path) -> list[dict]:
    """What a step has written; of the lines about one item the last."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    last = {line["item"]: line for line in lines if "item" in line}
    return [line for line in lines if line is last.get(line.get("item"), line)]


def _name(step: str, shard: int) -> str:
    return f"{step}.{shard}.jsonl" if shard else f"{step}.jsonl"


def _reached(path: Path) -> Path:
    """A file of a number, and of the name of the item that is at work."""
    return path.with_suffix(".reached")


def _begun(path: Path) -> int | None:
    """How many items a step has behind it that is not done with all; None where it is."""
    reached = _reached(path)
    return int(reached.read_text(encoding="utf-8").split()[0]) if reached.exists() else None


def _hangs(path: Path, seconds: float) -> bool:
    """Whether an item has been at work for so long; who stopped for it is told in the lines."""
    reached = _reached(path)
    if not reached.exists() or time.time() - reached.stat().st_mtime < seconds:
        return False
    _, _, item = reached.read_text(encoding="utf-8").partition(" ")
    line = dict(hung=item, seconds=seconds, ok=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return True


def _ask_device() -> None:
    """Raises where an error, such as a read out of bounds, has ended all work of this process."""
    import jax

    jax.block_until_ready(jax.numpy.zeros(()) + 1)


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:300]


def run_step(args) -> int:
    """One step, in this process."""
    from benchmarks import device_checks, device_timing

    log = Log(args.out, args.step, args.seconds or STEPS[args.step][0], args.shard, args.first)
    try:
        module = device_checks if hasattr(device_checks, args.step) else device_timing
        share = (args.shard, args.shards) if STEPS[args.step][1] > 1 else ()
        only = {"only": args.only} if args.only else {}
        getattr(module, args.step)(log, args.dry_run, *share, **only)
    except Exception as e:
        traceback.print_exc()
        log.write(ok=False, died=f"{type(e).__name__}: {e}"[:1500])
        return DIED
    if log.whole:
        _reached(log.path).unlink(missing_ok=True)
    return min(1, log.failures)


def run_all(args) -> int:
    """Every step that is asked for, each in a process or several."""
    kind = "dry-run"
    if not args.dry_run:
        kind, missing = _machine()
        if missing:
            print(f"on_device can't run here: {missing}", file=sys.stderr)
            return 2
    out = args.out or RESULTS / re.sub("[^a-z0-9]+", "-", kind.lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    renew = functools.partial(bundle, out, args.bundle) if args.bundle else lambda: None
    renew()  # where it can't be written, that is told before anything is measured
    worst, report, waiting = 0, out / "summary.json", list(args.steps)
    summary = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    while waiting:
        left = end - time.monotonic()
        # What one step does not need is the others'.
        share = left / sum(STEPS[step][0] for step in waiting)
        step = waiting.pop(0)
        seconds, processes = STEPS[step][0] * share, 1 if args.dry_run else STEPS[step][1]
        start = time.monotonic()
        if left < 10:  # what an earlier run left of this step stays
            summary[step] = "no time left"
            write_whole(report, (json.dumps(summary, indent=1) + "\n").encode())
            renew()
            continue
        lines = [] if args.first else out.glob(f"{step}.*jsonl")  # else it goes on with them
        for stale in [*lines, *out.glob(f"{step}.*reached")]:
            stale.unlink()
        print(f"{step} (at most {seconds:.0f} s)", flush=True)
        codes = _run_processes(out, step, seconds, processes, args.dry_run, renew, args.first)
        summary[step] = {"exit": max(codes, key=abs), "seconds": round(time.monotonic() - start, 1)}
        if processes == 1 and (begun := _begun(out / f"{step}.jsonl")) is not None:
            summary[step]["next"] = begun  # for --from
        _join_shards(out, step)
        worst = max(worst, *map(abs, codes))
        write_whole(report, (json.dumps(summary, indent=1) + "\n").encode())
        renew()
    print("\n".join(_conclusions(out, args.steps, summary)))
    return min(1, worst)


def bundle(out: Path, path: Path) -> None:
    """Packs the files of a folder into one, which never is half of it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for file in sorted(out.iterdir()):
            if not file.is_file() or file.suffix in (".new", path.suffix):
                continue
            try:
                content = file.read_bytes()
            except FileNotFoundError:  # its step has just begun it anew
                continue
            # By what was read, as a step may go on writing meanwhile.
            info = tarfile.TarInfo(f"{out.name}/{file.name}")
            info.size, info.mtime = len(content), time.time()
            tar.addfile(info, io.BytesIO(content))
    write_whole(path, packed.getvalue())


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file at once: who reads it meanwhile gets the old one or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    os.replace(new, path)


def _run_processes(
    out: Path, step: str, seconds: float, processes: int, dry: bool,
    renew: Callable[[], None] = lambda: None, first: int = 0,
) -> list[int]:  # fmt: skip
    """The exit statuses of a step's processes, those included that took over from others.

    Args:
      renew: is called every `RENEWED` seconds meanwhile.
      first: the item to begin with.
    """
    end, renewed = time.monotonic() + seconds, time.monotonic()

    def start(shard: int, first: int) -> subprocess.Popen:
        command = [
            sys.executable, "-m", "benchmarks.on_device", "--step", step, "--out", str(out),
            "--seconds", str(end - time.monotonic()), "--from", str(first),
            "--shard", str(shard), "--shards", str(processes), *(["--dry-run"] if dry else []),
        ]  # fmt: skip
        return subprocess.Popen(command, env=_environment(out, dry), process_group=0)

    running = {shard: (start(shard, first), first) for shard in range(processes)}
    codes = []
    try:
        while running:
            time.sleep(0.05)
            if time.monotonic() > renewed + RENEWED:
                renew()
                renewed = time.monotonic()
            for shard, (process, first) in list(running.items()):
                code, path = process.poll(), out / _name(step, shard)
                if code is None and time.monotonic() > end + GRACE:
                    kill(process)
                    code = 124
                elif code is None and _hangs(path, STUCK.get(step, math.inf)):
                    kill(process)
                    code = DIED
                if code is None:
                    continue
                codes.append(code)
                del running[shard]
                begun = _begun(path) or 0
                # One that died before it came any further would only die again.
                if (code == DIED or code < 0) and begun > first and time.monotonic() < end - 5:
                    os.utime(_reached(path))  # that one's time counts from now on
                    running[shard] = (start(shard, begun), begun)
    finally:
        for process, _ in running.values():
            kill(process)
    return codes


def _environment(out: Path, dry: bool) -> dict[str, str]:
    found = os.environ | {
        # Several processes share the device, and nobody's must find its memory taken.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # What is tuned lies among the results, where each step finds it, and whoever gets those.
        "CONV_PALLAS_TUNED": str(out.resolve()),
    }
    if not dry:
        # XLA tries its algorithms for minutes as it compiles the baselines; the next run finds what
        # this one did, on another machine too where the folder is one that travels.
        cache = Path(tempfile.gettempdir()) / f"conv_pallas_{os.getuid()}_xla"
        found.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
        found.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        # JAX looks for a ptxas to assemble Triton's code with. Any toolkit's goes first.
        ptxas = Path(triton.origin).parent / "backends/nvidia/bin"
        found["PATH"] = os.pathsep.join([found.get("PATH", os.defpath), str(ptxas)])
    return found


def kill(process: subprocess.Popen) -> None:
    """The process and what it has started: whatever goes on would disturb the next step."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(REAPED)
    except subprocess.TimeoutExpired:  # it waits in the driver, say, and the others can't wait
        print(f"process {process.pid} outlives its end", file=sys.stderr)


def _join_shards(out: Path, step: str) -> None:
    """What the other processes of a step wrote goes to the end of the first one's file."""
    for shard in sorted(out.glob(f"{step}.*.jsonl")):
        with (out / f"{step}.jsonl").open("a", encoding="utf-8") as whole:
            whole.write(shard.read_text(encoding="utf-8"))
        shard.unlink()
    for reached in out.glob(f"{step}.*reached"):
        reached.unlink()


def _conclusions(out: Path, steps: Iterable[str], summary: dict) -> Iterator[str]:
    """What a reader of the last lines alone has to know."""
    for step in steps:
        lines = lines_of(out / f"{step}.jsonl")
        counts = {
            "right": sum(line.get("ok") is True for line in lines),
            "wrong": sum(line.get("ok") is False for line in lines),
            "declined": sum("declined" in line for line in lines),
            "cut short": sum("cut_short" in line for line in lines),
        }
        told = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
        yield f"{step}: {json.dumps(summary.get(step))} {len(lines)} lines{told and ': '}{told}"
        wrong = [line for line in lines if line.get("ok") is False]
        yield from (f"  {json.dumps(line)[:300]}" for line in wrong[:8])
        goals = {line["goal"]: line for line in lines if "goal" in line}
        yield from (f"  {json.dumps(line)}" for line in goals.values())


_ASK = """
import json, jax, benchmarks
missing = None
try:
    from conv_pallas.kernels import triton_compat
except ModuleNotFoundError as e:
    missing = e.name
print(json.dumps([jax.default_backend(), jax.devices()[0].device_kind, missing]))
"""


def _machine() -> tuple[str, str | None]:
    """The device's name, and what is missing; told by a process of its own.

    So this one leaves the GPU alone.
    """
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True)
    last = next(iter(done.stderr.strip().splitlines()[-1:]), "")
    if done.returncode:
        return "", f"JAX or the package fails to start: {last}"
    backend, kind, missing = json.loads(done.stdout.splitlines()[-1])
    if backend != "gpu":
        return kind, f"JAX runs on {backend}, and sees no NVIDIA GPU. {last}".rstrip()
    return kind, missing and f"the package {missing} is not installed"


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
    parser.add_argument(
        "--bundle", type=Path, metavar="PATH", help="a .tgz of that folder, kept up to date"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all steps together")
    parser.add_argument(
        "--steps", type=_steps, default=[step for step in STEPS if step not in ASKED_FOR],
        metavar="NAMES",
        help=f"only these, with commas: {', '.join(STEPS)}; without it all but "
        f"{', '.join(ASKED_FOR)}",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="first", type=int, default=0, metavar="N",
        help="go on with that item of the one step, after what is there; summary.json tells it",
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
    if args.first and not args.step and [STEPS[step][1] for step in args.steps] != [1]:
        parser.error("--from needs --steps with one step, of one process")
    return run_step(args) if args.step else run_all(args)


if __name__ == "__main__":
    sys.exit(main())
