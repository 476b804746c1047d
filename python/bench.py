"""Times xent_torch beside PyTorch, and says whether it passes or falls short.

    python bench.py [--threads 2] [--rounds 9] [--markdown] [--picture FILE.svg] [CASE ..]

Each round times both, one after the other, so that a noisy machine troubles both alike; the figure
is the median of the rounds' ratios. Memory is the peak of the resident set beside the operands, in
sizes of the first operand, each in a process of its own. A picture takes matplotlib.
"""

import argparse
import concurrent.futures
import datetime
import math
import multiprocessing
import pathlib
import resource
import statistics
import sys
import time

# The sources beside this script have no compiled part; the installed package has.
HERE = pathlib.Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if pathlib.Path(path).resolve() != HERE]

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import xent_torch  # noqa: E402

MEGABYTE = 2**20


def _logits(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    rows = (*shape[:1], *shape[2:])
    return logits, torch.randint(shape[1], rows, generator=generator)


def _linear(rows, features, classes):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, features, generator=generator).requires_grad_()
    weight = (torch.randn(classes, features, generator=generator) / features**0.5).requires_grad_()
    return hidden, weight, torch.randint(classes, (rows,), generator=generator)


# Operands, the name of the function, whether there is a backward, the least ratio of times, the
# most memory beside the operands, in sizes of the first operand.
CASES = {
    "4096x50257 f32": (_logits, (4096, 50257), {}, "cross_entropy", True, 4.0, 1.1),
    "4096x50257 bf16": (
        _logits,
        (4096, 50257),
        {"dtype": torch.bfloat16},
        "cross_entropy",
        True,
        3.0,
        1.1,
    ),
    "65536x10": (_logits, (65536, 10), {}, "cross_entropy", True, 3.5, None),
    "8x21x256x256": (_logits, (8, 21, 256, 256), {}, "cross_entropy", True, 3.0, 1.1),
    "8x10": (_logits, (8, 10), {}, "cross_entropy", True, 1.0, None),
    "8x10 forward": (_logits, (8, 10), {}, "cross_entropy", False, 1.0, None),
    "linear 1024x512x32000": (
        _linear,
        (1024, 512, 32000),
        {},
        "linear_cross_entropy",
        True,
        None,
        None,
    ),
}


def _call(function, operands, backward):
    if not backward:
        with torch.no_grad():
            function(*operands)
        return
    for operand in operands:
        operand.grad = None
    function(*operands).backward()


def _seconds(function, operands, backward, calls):
    start = time.perf_counter()
    for _ in range(calls):
        _call(function, operands, backward)
    return (time.perf_counter() - start) / calls


def _compare(name, rounds):
    """The medians of the times in seconds, and the median of their ratio."""
    make, shape, keywords, function, backward, *_ = CASES[name]
    operands = make(*shape, **keywords)
    ours, theirs = getattr(xent_torch, function), getattr(F, function)
    once = min(_seconds(theirs, operands, backward, 1) for _ in range(3))
    _call(ours, operands, backward)
    calls = max(1, int(0.1 / once))
    if calls > 100:
        rounds *= 3
    pairs = [
        (_seconds(ours, operands, backward, calls), _seconds(theirs, operands, backward, calls))
        for _ in range(rounds)
    ]
    mine, other = (statistics.median(times) for times in zip(*pairs, strict=True))
    return mine, other, statistics.median(theirs / ours for ours, theirs in pairs)


def _peak(name, package, threads):
    """The growth of the peak of the resident set, in sizes of the first operand."""
    torch.set_num_threads(threads)
    make, shape, keywords, function, backward, *_ = CASES[name]
    function = getattr(xent_torch if package == "xent" else F, function)
    small = make(*((8, 10) if make is _logits else (8, 4, 10)), **keywords)
    _call(function, small, backward)
    operands = make(*shape, **keywords)
    size = operands[0].nbytes
    # Freed memory of the operands' making must not hide what the call takes.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _resident()
    _call(function, operands, backward)
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM"))
    peak = int(line.split()[1]) * 1024
    return (peak - before) / size, (peak - before) / MEGABYTE


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _memory(name, package, threads):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as processes:
        return processes.submit(_peak, name, package, threads).result()


def _time(seconds):
    return f"{seconds * 1e3:.1f} ms" if seconds > 1e-3 else f"{seconds * 1e6:.1f} µs"


def _machine():
    """The processor, and the date."""
    with open("/proc/cpuinfo") as file:
        (name, *_) = (line.split(":")[1].strip() for line in file if line.startswith("model name"))
    return f"{name}, {datetime.date.today():%d %B %Y}"


def _figure(size):
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"


def _draw(file, threads, rows):
    """Draws times and memory of some cases, PyTorch's and xent's."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "xent", "font.size": 10})
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.4, 0.8 + 0.62 * len(rows)), sharey=True)
    titles = ("time, xent = 1", "peak of memory beside the operands, MB")
    figure.suptitle(f"Loss and gradient, {threads} threads. {_machine()}", fontsize=10)
    for panel, title, of in zip(panels, titles, (1, 2), strict=True):
        for shift, package, colour in ((-0.2, 0, "#2a78d6"), (0.2, 1, "#b9b7b0")):
            sizes = [row[of][package] for row in rows]
            places = [place + shift for place in range(len(rows))]
            bars = panel.barh(places, sizes, 0.36, color=colour, label=("xent", "PyTorch")[package])
            panel.bar_label(bars, fmt=_figure, padding=3)
        panel.set_title(title, fontsize=10)
        panel.set_yticks(range(len(rows)), [row[0] for row in rows])
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xmargin(0.18)
    panels[0].invert_yaxis()
    panels[1].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--markdown", action="store_true", help="print rows of a table")
    parser.add_argument("--picture", metavar="FILE.svg", help="draw the large cases")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    fell_short, drawn = [], []
    for name in arguments.cases or CASES:
        *_, least, most = CASES[name]
        mine, other, ratio = _compare(name, arguments.rounds)
        large = math.prod(CASES[name][1]) > 100000
        sizes = [
            _memory(name, package, arguments.threads) if large else None
            for package in ("xent", "torch")
        ]
        verdict = "passes"
        if least is not None and ratio < least:
            verdict = f"falls short of {least}x"
        if most is not None and sizes[0][0] > most:
            verdict = f"falls short of {most}x in memory"
        if verdict != "passes":
            fell_short.append(name)
        if large:
            drawn.append((name, (1.0, ratio), tuple(size[1] for size in sizes)))
        memory = [f"{size[0]:.2f}x, {size[1]:.0f} MB" if size else "" for size in sizes]
        row = (name, _time(mine), _time(other), f"{ratio:.2f}", *memory, verdict)
        if arguments.markdown:
            print("| " + " | ".join(row[:-1]) + " |", flush=True)
        else:
            print(
                "{:<24} xent {:>9}  torch {:>9}  ratio {:>6}  memory {} / {}  {}".format(*row),
                flush=True,
            )
    if arguments.picture:
        _draw(arguments.picture, arguments.threads, drawn)
    if fell_short:
        raise SystemExit(f"falls short: {', '.join(fell_short)}")


if __name__ == "__main__":
    main()
