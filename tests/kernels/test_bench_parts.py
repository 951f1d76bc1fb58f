"""Parts of the acceptance that need a GPU or packages that few machines have, with stand-ins for both.

The peers' calls, ncu's lines, the processes of a task, and the kernels that load no domains.

Shapes: N tokens, H hidden, V vocabulary.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import triton_interpreter
from commands import ENVIRONMENT, ROOT
from torch.nn.functional import cross_entropy

from megamix.core.processes import process_began

BENCH = ROOT / "kernels" / "bench"


@pytest.fixture
def module(monkeypatch):
    """Imports a module of the benchmark, for this test alone."""
    monkeypatch.syspath_prepend(str(BENCH))
    made = []

    def load(name):
        made.append(name)
        return importlib.import_module(name)

    yield load
    for name in made:
        sys.modules.pop(name)


def rows_and_gradients(logits_NV, labels_N, *, return_dx, inplace_backward):
    """A stand-in for QuACK's forward pass: a loss a row and, over the logits, the gradients of each."""
    assert return_dx
    assert inplace_backward
    leaf_NV = logits_NV.clone().requires_grad_()
    with torch.enable_grad():
        loss_N = cross_entropy(leaf_NV, labels_N, reduction="none")
        loss_N.sum().backward()
    return loss_N.detach(), logits_NV.copy_(leaf_NV.grad)


class Four(torch.autograd.Function):
    """A stand-in for Liger's functions, which return the loss first of four."""

    @staticmethod
    def forward(ctx, first, *others):
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (first, *others) if tensor.is_floating_point()]
            logits_NV = leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].T
            labels_N = next(tensor for tensor in others if not tensor.is_floating_point())
            loss = cross_entropy(logits_NV, labels_N)
            ctx.gradients = torch.autograd.grad(loss, leaves)
        ctx.num_others = 1 + len(others) - len(leaves)
        return loss.detach(), None, None, None

    @staticmethod
    def backward(ctx, *grad_outputs):
        return *(gradient * grad_outputs[0] for gradient in ctx.gradients), *[None] * ctx.num_others


def stand_ins(monkeypatch):
    """Packages with the functions that the peers call, named as their published versions name them."""

    def linear(hidden_NH, weight_VH, labels_N, *, filter_eps="high"):
        assert filter_eps is None
        return cross_entropy(hidden_NH @ weight_VH.T, labels_N)

    class Rows(Four):
        @staticmethod
        def forward(ctx, logits_NV, labels_N, weight):
            assert weight is None
            found = Four.forward(ctx, logits_NV, labels_N)
            ctx.num_others += 1
            return found

    ops = "liger_kernel.ops.cutedsl.ops"
    packages = {
        "quack.cross_entropy": {"cross_entropy_fwd": rows_and_gradients},
        "quack.linear_cross_entropy": {
            "chunked_linear_cross_entropy": lambda hidden_NH, weight_VH, labels_N: linear(
                hidden_NH, weight_VH, labels_N, filter_eps=None
            )
        },
        "cut_cross_entropy": {"linear_cross_entropy": linear},
        f"{ops}.cross_entropy": {"LigerCrossEntropyFunction": Rows},
        f"{ops}.fused_linear_cross_entropy": {"LigerFusedLinearCrossEntropyFunction": Four},
    }
    for name, functions in packages.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        for function, made in functions.items():
            setattr(sys.modules[name], function, made)
        if len(parts) > 1:
            monkeypatch.setattr(sys.modules[".".join(parts[:-1])], parts[-1], sys.modules[name], raising=False)


@pytest.mark.parametrize("name", ["quack return_dx", "liger-kernel cute", "torch"])
def test_a_peer_of_logits_returns_the_mean_and_its_gradient(name, module, monkeypatch):
    stand_ins(monkeypatch)
    peers = module("peers")
    logits_NV, labels_N = torch.randn(6, 9), torch.arange(6)
    leaf_NV, want_NV = logits_NV.clone().requires_grad_(), logits_NV.clone().requires_grad_()
    loss = peers.PEERS[name](torch.device("cpu"))(leaf_NV * 1, labels_N)
    (loss * peers.INCOMING).backward()
    want = cross_entropy(want_NV, labels_N)
    (want * peers.INCOMING).backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(leaf_NV.grad, want_NV.grad)


@pytest.mark.parametrize("name", ["megamix linear", "liger-kernel cute", "quack", "cut-cross-entropy"])
def test_a_peer_of_hidden_states_returns_the_mean_and_its_gradients(name, module, monkeypatch):
    stand_ins(monkeypatch)
    peers = module("peers")
    factors = torch.randn(6, 4), torch.randn(9, 4)
    leaves, wanted = ([factor.clone().requires_grad_() for factor in factors] for _ in range(2))
    loss = peers.LINEAR[name](torch.device("cpu"))(*leaves, torch.arange(6))
    (loss * peers.INCOMING).backward()
    want = cross_entropy(wanted[0] @ wanted[1].T, torch.arange(6))
    (want * peers.INCOMING).backward()
    torch.testing.assert_close(loss, want)
    for leaf, other in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)


HEAD = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'


def lines_of_ncu(launches):
    """What ncu prints with --csv: a line for each counter of a launch, thousands with commas."""
    lines = ["==PROF== Connected to process 7", '==PROF== Profiling "loss_rows": 0%....100% - 2 passes', HEAD]
    for index, counters in enumerate(launches):
        lines += [f'"{index}","7","kernel","{name}","byte","{value}"' for name, value in counters.items()]
    return "\n".join(lines) + "\n"


def test_bytes_a_logit_from_what_ncu_prints(module, tmp_path, monkeypatch):
    counters = module("counters")
    read, written, sectors = (counters.COUNTERS[name][0] for name in ("DRAM read", "DRAM written", "L2 read"))
    # 100 logits. The second reading takes 150 of 200 bytes from memory.
    ran = {
        "A": [{read: 350, written: "200", sectors: "12.5", "lts__t_sectors_op_write.sum": "n/a"}],
        "B": [{read: "200"}, {read: "2,000"}],
    }
    program = tmp_path / "ncu"
    answers = {mode: lines_of_ncu(launches) for mode, launches in ran.items()}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        "request = json.loads(sys.argv[-1])\nassert request['kind'] == 'step'\n"
        f"print(json.load(open({str(tmp_path / 'answers.json')!r}))[request['mode']])\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    figure = lambda metric, value, unit, note="": {"metric": metric, "value": value}  # noqa: E731
    rows = counters.measure({"shape": "10x10", "kind": "bytes"}, figure)
    assert {row["metric"]: row["value"] for row in rows} == {
        "mode A: DRAM read": 3.5,
        "mode A: DRAM written": 2.0,
        "mode A: L2 read": 4.0,
        "mode B, forward: DRAM read": 2.0,
        "mode B, backward: DRAM read": 20.0,
        "second reading, from DRAM": 0.75,
    }
    program.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM - The user does not have permission'\n")
    (row,) = counters.measure({"shape": "10x10", "kind": "bytes"}, figure)
    assert row["metric"] == "failed"
    assert "counted 0 launches of 1: ==ERROR== ERR_NVGPUCTRPERM" in row["note"]
    program.unlink()
    (row,) = counters.measure({"shape": "10x10", "kind": "bytes"}, figure)
    assert row == {"metric": "failed", "note": "not installed (ncu is not on the PATH)"}


# A task that starts a process of its own, as bench_step.py starts ranks, and says which.
TASK = """
import subprocess, sys
sys.path.insert(0, {bench!r})
import running
running.end_with_owner()
subprocess.run([sys.executable, "-c", {child!r}])
"""
CHILD = """
import os, pathlib, time
pathlib.Path({mark!r} + ".part").write_text(str(os.getpid()))
os.rename({mark!r} + ".part", {mark!r})
time.sleep(600)
"""
OWNER = """
import os, subprocess, sys, time
sys.path.insert(0, {bench!r})
import running

def communicate(process, timeout):
    while not os.path.exists({mark!r}):
        time.sleep(0.05)
    if {too_long}:
        raise subprocess.TimeoutExpired("task", timeout)
    time.sleep(600)

subprocess.Popen.communicate = communicate
print(running.run([sys.executable, "-c", {task!r}], {{}}, 7.0))
"""


def wait_for(told):
    for _ in range(2400):
        if told():
            return
        time.sleep(0.05)
    raise AssertionError("nothing within two minutes")


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for a process")
@pytest.mark.parametrize("ending", ["too long", "interrupted", "killed"])
def test_nothing_outlives_a_task_or_the_acceptance(ending, tmp_path):
    mark = str(tmp_path / "process")
    task = TASK.format(bench=str(BENCH), child=CHILD.format(mark=mark))
    owner = OWNER.format(bench=str(BENCH), mark=mark, task=task, too_long=ending == "too long")
    with subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: os.path.exists(mark))
        child = int(Path(mark).read_text())
        assert ending == "too long" or process_began(child) is not None
        if ending != "too long":
            process.send_signal(signal.SIGINT if ending == "interrupted" else signal.SIGKILL)
        said, _ = process.communicate(timeout=300)
    wait_for(lambda: process_began(child) is None)
    assert said.decode() == ("Ended(code=None, stderr='')\n" if ending == "too long" else "")


WITHOUT_DOMAINS = """
import torch
import measure
from megamix_kernels import DomainSums, domain_cross_entropy
logits_NV, labels_N = torch.randn(3, 40), torch.tensor([1, -100, 39])
found = []
for domain in (0, 2):
    sums = DomainSums(3)
    domain_N = torch.full((3,), domain)
    with measure._without_domains():
        out = domain_cross_entropy(logits_NV, labels_N, domain_N, 3, sums=sums, implementation="triton")
    want = torch.nn.functional.cross_entropy(logits_NV, labels_N)
    torch.testing.assert_close(out.loss, want)
    assert sums.tokens.tolist() == [2, 0, 0], sums.tokens
    out = domain_cross_entropy(logits_NV, labels_N, domain_N, 3, sums=sums, implementation="triton")
    assert sums.tokens.sum() == 4 and sums.tokens[domain] >= 2
print("as it should be")
"""


@pytest.mark.skipif(triton_interpreter.why_not() is not None, reason=str(triton_interpreter.why_not()))
def test_kernels_that_load_no_domains_give_the_same_loss(tmp_path):
    environment = ENVIRONMENT | {"TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCH), environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DOMAINS], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.stdout == "as it should be\n", done.stderr[-4000:]
