"""Generated packages in a process that cannot import gdn2gen, in Triton's interpreter."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from source_tree import ROOT

# Begins a process that cannot import gdn2gen, in Triton's interpreter, which is hastened as
# elsewhere. NumPy may be newer than Triton knows.
WITHOUT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from gdn2gen.codegen.hasten import hasten
from gdn2gen.codegen.interpreter import mend_loops
mend_loops()
hasten()
del sys.path[0]
for name in [x for x in sys.modules if x.split(".")[0] == "gdn2gen"]:
    sys.modules[name] = None
"""
# For each (package, calls) the outputs and gradients of each call, or what it raised; or what a
# package's own test says. One folder after the other, whose modules are forgotten.
_CHILD = (
    WITHOUT
    + """
import contextlib, importlib, io, json, os, runpy, traceback
import torch


def answers_of(jobs):
    answers = []
    for package, calls in jobs:
        module = importlib.import_module(package)
        answers += [answer_of(module, call) for call in calls]
    return answers


def answer_of(module, call):
    leaves = {
        name: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in call["arguments"].items()
    }
    if call.get("negative"):
        # views whose values torch negates where it reads them
        leaves = {
            name: torch._neg_view(-x) if getattr(x, "requires_grad", False) else x
            for name, x in leaves.items()
        }
        call["gradients"] = {k: torch._neg_view(-x) for k, x in call["gradients"].items()}
    (name,) = module.__all__
    function, hooks = getattr(module, name), contextlib.nullcontext()
    if call.get("hooked"):
        # hooks that give back what was saved with strides
        unpack = lambda x: torch.stack((x, x), -1)[..., 0]
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack)
    if call.get("mapped"):
        plain, rest = function, dict(leaves)
        rest.pop("v")
        function = lambda v, **_: torch.vmap(lambda v: plain(v=v, **rest))(v[None])
    try:
        with hooks:
            o, state = function(**leaves)
    except (ValueError, TypeError) as error:
        return type(error).__name__, str(error)
    found = {"o": o.detach()}
    outputs, seeds = [o], [call["gradients"]["o"]]
    if state is not None:
        found["final_state"] = state.detach()
        outputs.append(state)
        seeds.append(call["gradients"]["final_state"])
    names = [name for name, x in leaves.items() if getattr(x, "requires_grad", False)]
    grads = torch.autograd.grad(outputs, [leaves[name] for name in names], seeds)
    return found | {f"d{name}": x for name, x in zip(names, grads)}


def carry_out(question, answer):
    if question:
        torch.save(answers_of(torch.load(question)), answer)
    else:
        runpy.run_module("made.test_kernels", run_name="__main__")


for line in sys.stdin:
    folder, *paths = json.loads(line)
    os.chdir(folder)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    known, code = set(sys.modules), 0
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            carry_out(*paths)
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    del sys.path[0]
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
)


@cache
def _child() -> subprocess.Popen[str]:
    """The one process for all tests here: to begin one takes 3 s of a core."""
    env = os.environ | {"TRITON_INTERPRET": "1"}
    env.pop("PYTHONPATH", None)
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    atexit.register(child.kill)
    return child


def ask(folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """What the child makes of a folder: of a file of jobs, or of the package's own test."""
    child = _child()
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(json.dumps([str(folder), *map(str, paths or ("", ""))]) + "\n")
    child.stdin.flush()
    code, out, err = json.loads(child.stdout.readline())
    return subprocess.CompletedProcess([], code, out, err)
