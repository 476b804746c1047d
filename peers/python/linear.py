"""Linear layers with cross-entropy, xent beside PyTorch: `linear.py XENT_PEER [OPTION VALUE]...`.

XENT_PEER is the program of peers/c/linear.c. In each round every form of PyTorch takes its turn beside each plan of
xent; a figure is the median of the ratios of the rounds. Options: --threads N, --rounds N, --budget SECONDS,
--shapes ROWSxFEATURESxCLASSES,..., --record FILE.
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

SHAPES = "1024x768x50257,1024x1024x32000,2048x2048x32000,256x4096x128256"
WEIGHT = 3 << 30  # where the weight begins in the sequence
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
KINDS = ["forward", "hidden", "both"]
# Bytes that a call may allocate: as few as it can do with, and enough for 256 rows of logits.
PLANS = {"lean": lambda rows, features, classes: 0, "chunk": lambda rows, features, classes: (256 + features) * classes * 4 + (64 << 20)}
# What xent is to reach: times the speed, by dtype, beside the form of PyTorch.
TARGETS = {
    ("torch", "lean", "both"): {"f32": 1.8, "bf16": 1.0},
    ("torch", "chunk", "both"): {"f32": 2.2, "bf16": 1.3},
    ("torch-chunked", "lean", "both"): {"f32": 2.0, "bf16": 5.0},
    ("torch", "lean", "forward"): {"f32": 2.5, "bf16": 1.6},
    ("torch", "lean", "hidden"): {"f32": 2.5, "bf16": 1.8},
}


def values(first, rows, columns, by):
    """The matrix that peers/c/linear.c has, f32."""
    h = np.arange(first, first + rows * columns).astype(np.uint32) * np.uint32(2654435761) + np.uint32(12345)
    h ^= h >> np.uint32(15)
    h *= np.uint32(2246822519)
    h ^= h >> np.uint32(13)
    return ((h * (12.0 / 4294967296.0) - 6.0).astype(np.float32) / np.float32(by)).reshape(rows, columns)


def unfused(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight), targets)


def forms():
    """The ways in which PyTorch computes the loss."""
    result = {"torch": unfused, "torch-compile": torch.compile(unfused, dynamic=False)}
    if hasattr(F, "linear_cross_entropy"):
        result["torch-chunked"] = F.linear_cross_entropy
    return result


def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def time_torch(loss_of, operands, kind, budget):
    """Seconds of the fastest call, the loss, and the bytes by which calls raise the resident memory."""
    hidden, weight, targets = operands
    hidden = hidden.detach().requires_grad_(kind != "forward")
    weight = weight.detach().requires_grad_(kind == "both")

    def step():
        hidden.grad = weight.grad = None
        with torch.set_grad_enabled(kind != "forward"):
            loss = loss_of(hidden, weight, targets)
        if kind != "forward":
            loss.backward()
        return loss.item()

    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = resident("VmRSS")
    step()  # compiles, starts threads
    best, begin, loss = float("inf"), time.perf_counter(), 0.0
    while best == float("inf") or time.perf_counter() - begin < budget:
        start = time.perf_counter()
        loss = step()
        best = min(best, time.perf_counter() - start)
    gradients = sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    return best, loss, max(resident("VmHWM") - before - gradients, 0)


class Xent:
    def __init__(self, program, threads):
        pinned = ["taskset", "-c", f"0-{threads - 1}", program]
        environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(pinned, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.version = self.process.stdout.readline().removeprefix("ready ").strip()

    def time(self, shape, dtype, kind, workspace, budget):
        request = *shape, dtype, kind, workspace, budget
        print(*request, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().split()
        if len(answer) != 3:
            sys.exit(f"xent answers {answer}")
        return float(answer[0]), float(answer[1]), int(answer[2])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("xent")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--record", default=os.devnull)
    options = parser.parse_args()
    os.sched_setaffinity(0, range(options.threads))
    torch.set_num_threads(options.threads)
    xent = Xent(options.xent, options.threads)
    print(f"xent {xent.version}, torch {torch.__version__}, {options.threads} threads")

    ratios, lines = {}, []
    for shape in (tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")):
        rows, features, classes = shape
        for dtype in DTYPES:
            hidden = torch.from_numpy(values(0, rows, features, 2)).to(DTYPES[dtype])
            weight = torch.from_numpy(values(WEIGHT, classes, features, 60)).to(DTYPES[dtype])
            operands = hidden, weight, torch.arange(rows) * 7919 % classes
            torch._dynamo.reset()  # or it would give up after some shapes
            ways = forms()
            print(f"\n{dtype} {rows}x{features}x{classes}: milliseconds, MiB, and how many times xent's")
            for kind in KINDS:
                turns = {}
                for _ in range(options.rounds):
                    for way, loss_of in ways.items():
                        try:
                            theirs = time_torch(loss_of, operands, kind, options.budget)
                        except Exception as error:
                            print(f"{way} absent: {str(error).splitlines()[0][:100]}")
                            ways = {name: of for name, of in ways.items() if name != way}
                            continue
                        time.sleep(0.03)  # OpenMP's threads spin for a while
                        for plan, workspace in PLANS.items():
                            if plan == "chunk" and kind == "forward":
                                continue
                            ours = xent.time(shape, dtype, kind, workspace(*shape), options.budget)
                            if abs(ours[1] - theirs[1]) > (1e-4 if dtype == "f32" else 2e-2) * abs(ours[1]):
                                print(f"{way}: a loss of {theirs[1]} instead of {ours[1]}")
                            turns.setdefault((way, plan), []).append((theirs, ours))
                for (way, plan), pairs in turns.items():
                    ratio = median(theirs[0] / ours[0] for theirs, ours in pairs)
                    figures = [median(pair[i][0] for pair in pairs) * 1e3 for i in (0, 1)]
                    memory = [median(pair[i][2] for pair in pairs) / 2**20 for i in (0, 1)]
                    ratios.setdefault((way, plan, kind, dtype), []).append((ratio, shape))
                    print(
                        f"{kind:<8} {way:<14} {figures[0]:9.1f} ({memory[0]:6.0f})   "
                        f"{plan:<6} {figures[1]:9.1f} ({memory[1]:6.0f})   {ratio:5.2f}x"
                    )
                    lines.append(
                        f"{way},{plan},{dtype},{rows}x{features}x{classes},{kind},{options.threads},"
                        f"{figures[0]:.1f},{figures[1]:.1f},{memory[0]:.0f},{memory[1]:.0f},{ratio:.2f}\n"
                    )

    print("\nratios to reach")
    for (way, plan, kind), targets in TARGETS.items():
        for dtype, target in targets.items():
            found = ratios.get((way, plan, kind, dtype))
            if found:
                ratio, (rows, features, classes) = min(found)
                verdict = "pass" if ratio >= target else "falls short"
                print(
                    f"{kind:<8} {dtype:<5} {plan:<6} beside {way:<14} {ratio:5.2f}  >= {target:<4} {verdict}  "
                    f"({rows}x{features}x{classes})"
                )
    with open(options.record, "w") as record:
        record.write("form,plan,dtype,shape,kind,threads,ms,xent_ms,mib,xent_mib,ratio\n")
        record.writelines(lines)


main()
