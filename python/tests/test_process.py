"""Threads, processes and memory."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from xent_torch import cross_entropy

# Enough work for every thread.
ROWS, CLASSES = 512, 2048


def problem():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, generator=generator)
    return logits, torch.randint(CLASSES, (ROWS,), generator=generator)


LOGITS, TARGETS = problem()


def gradient():
    """The loss and some of its gradient. torch's own threads would hang in a forked child."""
    logits = LOGITS.detach().requires_grad_()
    loss = cross_entropy(logits, TARGETS)
    loss.backward()
    return loss.item(), logits.grad[ROWS // 2, :10].tolist()


def output_of(program, *arguments):
    """What a process of its own prints. It is isolated: the sources, which have no compiled part,
    may lie in the working directory.
    """
    command = [sys.executable, "-I", "-c", program, *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_threads_follow_torch():
    program = """
import os, time, torch, xent_torch
def threads():
    names = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
    return sum(name.startswith("xent-") for name in names)
x, t = torch.randn(512, 2048), torch.zeros(512, dtype=torch.long)
seen, losses = [], set()
for count in (1, 2, 4, 3):
    torch.set_num_threads(count)
    losses.add(xent_torch.cross_entropy(x, t).item())
    time.sleep(0.5)  # a thread names itself once it runs
    seen.append(threads())
assert len(losses) == 1, losses
print(seen)
"""
    # No pool for one thread, and one that grows: the pool of 2 has ended when that of 4 is there.
    assert output_of(program).strip() == "[0, 2, 4, 4]"


def test_work_is_shared():
    """The threads of the pool run, each a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        start, end = {}, {}
        for times in (start, end):
            for _ in range(50):
                gradient()
            for task in os.listdir("/proc/self/task"):
                with open(f"/proc/self/task/{task}/comm") as comm:
                    is_ours = comm.read().startswith("xent-")
                with open(f"/proc/self/task/{task}/schedstat") as statistics:
                    if is_ours:
                        times[task] = int(statistics.read().split()[0])
        assert end.keys() == start.keys()
        assert max(end[task] - start[task] for task in end) > 100_000  # ns
    finally:
        torch.set_num_threads(before)


def test_other_python_threads_run_meanwhile():
    """A call does not hold the interpreter's lock."""
    logits, targets = torch.randn(4096, 16384), torch.zeros(4096, dtype=torch.long)
    counts, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counts[0] += 1
            time.sleep(0)  # gives the lock back, so that the call can end

    def turns():
        before = counts[0]
        cross_entropy(logits, targets)
        return counts[0] - before

    thread = threading.Thread(target=count, daemon=True)
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    # The thread gets a turn only where the main thread gives the lock away by itself, which PyTorch's own functions do a
    # few times a call.
    sys.setswitchinterval(1000)
    torch.set_num_threads(1)
    try:
        thread.start()
        # Another program may have the processor during a call.
        assert any(turns() > 100 for _ in range(20))
    finally:
        torch.set_num_threads(threads)
        sys.setswitchinterval(interval)
        done.set()


def test_many_threads_at_once():
    expected, results = gradient(), []
    threads = [threading.Thread(target=lambda: results.append(gradient())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes(method):
    expected = gradient()  # starts threads, which a fork does not copy
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        results = [pool.apply_async(gradient) for _ in range(4)]
        assert [result.get(timeout=120) for result in results] == [expected] * 4


class Scored(torch.utils.data.Dataset):
    """A dataset whose workers compute losses."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        logits, targets = problem()
        return cross_entropy(logits + index, targets)


def test_workers_of_a_data_loader():
    gradient()
    loader = torch.utils.data.DataLoader(Scored(), num_workers=2, timeout=120)
    logits, targets = problem()
    assert_close(torch.cat(list(loader)), F.cross_entropy(logits, targets).expand(4))


def test_a_fork_while_calls_run():
    expected, stop = gradient(), threading.Event()

    def work():
        while not stop.is_set():
            gradient()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                os._exit(0 if gradient() == expected else 1)
            _, status = os.waitpid(child, 0)
            assert status == 0
    finally:
        stop.set()
        thread.join()


PEAK = """
import sys, torch, xent_torch
from torch.nn import functional as F
x = torch.randn(8, 21, 128, 128) if sys.argv[2] == "image" else torch.randn(512, 20000)
if sys.argv[2] == "bf16":
    x = x.bfloat16()
x.requires_grad_()
t = torch.randint(21, (8, 128, 128)) if x.dim() == 4 else torch.randint(20000, (512,))
keywords = {"reduction": "none"} if sys.argv[2] == "rows" else {}
function = xent_torch.cross_entropy if sys.argv[1] == "xent" else F.cross_entropy
function(torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))).backward()
cross = x * 1 if sys.argv[2] == "inplace" else x
if sys.argv[2] == "inplace":
    keywords = {"inplace": True}
def status(key):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
(grad,) = torch.autograd.grad(function(cross, t, **keywords).sum(), cross)
print((status("VmHWM") - before) / x.nbytes)
"""


def peak(package, case):
    """The growth of the peak of the resident set in one call, in sizes of the logits."""
    return float(output_of(PEAK, package, case))


@pytest.mark.parametrize(
    ("case", "most"),
    [("rows", 1.1), ("matrix", 1.1), ("bf16", 1.2), ("image", 1.2), ("inplace", 0.1)],
)
def test_memory(case, most):
    assert peak("xent", case) < most


def test_memory_of_pytorch_is_seen():
    """The measure tells the two apart."""
    assert peak("torch", "matrix") > 1.8


def test_nothing_is_saved_twice():
    """Autograd saves one tensor of the size of the logits; without reduction, the logits."""
    logits, targets = torch.randn(64, 100).requires_grad_(), torch.randint(100, (64,))
    for reduction in ("mean", "sum", "none"):
        sizes, pointers = [], []

        def pack(tensor, sizes=sizes, pointers=pointers):
            sizes.append(tensor.numel())
            pointers.append(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = cross_entropy(logits, targets, reduction=reduction)
        assert sorted(sizes)[-1] == logits.numel()
        assert sizes.count(logits.numel()) == 1
        if reduction == "none":
            assert pointers[sizes.index(logits.numel())] == logits.data_ptr()
        del loss


def test_without_dlpack():
    """Methods describe tensors where torch has no exchange interface of DLPack."""
    program = """
import torch
if WITHOUT:
    del torch.Tensor.__dlpack_c_exchange_api__
import xent_torch
x = torch.arange(24.0).view(2, 3, 4).sin().requires_grad_()
loss = xent_torch.cross_entropy(x, torch.tensor([[0, 1, 2, 0], [1, 1, 2, -100]]))
loss.backward()
print(loss.item(), x.grad.tolist())
try:
    xent_torch.cross_entropy(x[:0, :0].to_sparse(), torch.zeros(1))
except ValueError as error:
    print(error)
"""
    outputs = [output_of(program.replace("WITHOUT", without)) for without in ("False", "True")]
    assert outputs[0] == outputs[1] != ""
