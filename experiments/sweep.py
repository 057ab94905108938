"""One budget of the table of quality on more text, run by run, several at once: what to run next is decided here.

    python -m experiments.sweep --tokens 64 --gpus 0 1 --each 2 --minutes 60

For each row the learning rate is searched with seed 0, on a grid of factor sqrt(2), until both neighbours of the best
are worse. Then come the other seeds at the best rate, then half the warmup. The rows of equal time, "longer" and its
kin, take plain's setting. With --lr there is no search: the rows at that rate, seed by seed. Each run is one of
replicate.py: it is not repeated once its line is in the results, and after a cut it goes on where it was. The text's
tokens must lie in runs/: see texts.py.

One run has a GPU to itself, unless --each says otherwise. Sharing one gains little on an H100, even under NVIDIA MPS
(nvidia-cuda-mps-control -d). With --minutes, the runs still going are saved and stopped.
"""

import argparse
import os
import signal
import subprocess
import sys
import time

from experiments import quality, texts
from experiments.common import ROWS
from experiments.quality import AS_LONG_AS, WARMUP


def rate(k):
    """The learning rates of the grid: 1e-3 * sqrt(2) ** k, to two digits."""
    return float(f"{1e-3 * 2 ** (k / 2):.2g}")


GRID = [rate(k) for k in range(-6, 7)]


def bracket(losses):
    """{learning rate: loss} -> (the rates of the grid to run next, the best one if it is known)."""
    if missing := [lr for lr in (rate(-1), rate(0), rate(-2)) if lr not in losses]:
        return missing, None
    best = min(losses, key=losses.get)
    around = GRID[GRID.index(best) - 1], GRID[GRID.index(best) + 1]
    missing = [lr for lr in around if lr not in losses]
    return missing, None if missing else best


def wishes(tried, rows, seeds, lr=None):
    """tried: {row: {(lr, warmup): {seed: line}}} -> [(row, lr, warmup, seed)] still to run, the most urgent first."""
    if lr:
        runs = [(row, lr, WARMUP, seed) for seed in seeds for row in rows]
        return [run for run in runs if run[3] not in tried.get(run[0], {}).get(run[1:3], {})]
    stages, best = [[], [], [], []], {}
    for row in (row for row in rows if row not in AS_LONG_AS):
        done = tried.get(row, {})
        losses = {lr: runs[0]["val_loss"] for (lr, warmup), runs in done.items() if warmup == WARMUP and 0 in runs}
        rates, best[row] = bracket(losses)
        stages[0] += [(i, row, lr, WARMUP, 0) for i, lr in enumerate(rates)]
        if best[row]:
            stages[1] += [(seed, row, best[row], WARMUP, seed) for seed in seeds]
            stages[3] += [(0, row, best[row], WARMUP // 2, 0)]
    for row in (row for row in rows if row in AS_LONG_AS):
        if best.get("plain"):
            stages[2] += [(seed, row, best["plain"], WARMUP, seed) for seed in seeds]
    runs = [run[1:] for stage in stages for run in sorted(stage, key=lambda run: run[0])]  # rows take turns
    return [run for run in runs if run[3] not in tried.get(run[0], {}).get(run[1:3], {})]


def start(run, gpu, args):
    """A process that trains one run, its output in runs/sweep/."""
    row, lr, warmup, seed = run
    cell = f"{args.layers}l-post-{row}"
    command = f"-m experiments.replicate --device cuda --text {args.text} --tokens {args.tokens:g} --lr {lr:g}"
    command += f" --warmup {warmup} --seeds {seed} -- {cell}"
    log = texts.RUNS / "sweep" / f"{cell}-{args.tokens:g}-{lr:g}-{warmup}-s{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
    with log.open("a") as output:  # in a session of its own, so that Ctrl-C reaches it once, from here
        return subprocess.Popen([sys.executable, *command.split()], stdout=output, stderr=output, env=environment,
                                start_new_session=True)  # fmt: skip


def sweep(args):
    began, running, failed = time.monotonic(), {}, set()
    places = [(gpu, i) for i in range(args.each) for gpu in args.gpus]

    def say(*words):
        print(f"{(time.monotonic() - began) / 60:5.1f} min ", *words, flush=True)

    try:
        while time.monotonic() - began < args.minutes * 60:
            for place, (run, process) in list(running.items()):
                if process.poll() is not None:
                    del running[place]
                    say("done  " if process.returncode == 0 else "FAILED", place, *run)
                    if process.returncode:
                        failed.add(run)
            group = (args.layers, "post", "muon", args.tokens)
            tried = quality.tries(quality.finished(args.text)).get(group, {})
            busy = failed | {run for run, _ in running.values()}
            next_ones = [run for run in wishes(tried, args.rows, args.seeds, args.lr) if run not in busy]
            for place, run in zip([p for p in places if p not in running], next_ones, strict=False):
                running[place] = run, start(run, place[0], args)
                say("starts", place, *run)
            if not running:
                return say("nothing is left to run")
            time.sleep(2)
    except KeyboardInterrupt:
        pass
    for _, process in running.values():
        process.send_signal(signal.SIGINT)
    for place, (run, process) in running.items():
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        say("cut   " if process.returncode else "done  ", place, *run)


def main():
    parser = argparse.ArgumentParser(None, None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", choices=texts.TEXTS, default="linux", help="(default: %(default)s)")
    parser.add_argument("--tokens", type=float, required=True, help="the budget, in millions")
    parser.add_argument("--layers", type=int, default=24, help="of post-norm models (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["plain", "row3", "row4"], metavar="ROW")
    parser.add_argument("--lr", type=float, help="this learning rate, with the seeds, instead of a search")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--gpus", nargs="+", type=int, default=[0], help="(default: 0)")
    parser.add_argument("--each", type=int, default=1, help="runs at once on each GPU (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which to stop (default: none)")
    sweep(parser.parse_args())


if __name__ == "__main__":
    main()
