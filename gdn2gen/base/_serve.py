"""The child's side of a worker: answer requests over a pipe until the parent closes it.

Run as `python -m gdn2gen.base._serve FD`. A request is (target "module:function", args); a reply is
(status, value, detail). Light on purpose: torch comes in with the first request that needs it.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import re
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from gdn2gen.base import outcome
from gdn2gen.base.environment import hush

Reply = tuple[str, Any, str]


def serve(connection: Connection) -> int:
    """Answer until the pipe closes (0), or until a CUDA error made the context useless (3)."""
    hush()
    while True:
        try:
            target, args = connection.recv()
        except EOFError:
            return 0
        reply = answer(target, args)
        try:
            connection.send(reply)
        except BrokenPipeError:
            return 0
        except Exception as error:
            connection.send((outcome.ERROR, None, f"reply of {target} cannot be sent: {error}"))
        if reply[0] == outcome.CUDA_ERROR:
            return 3


def answer(target: str, args: tuple[Any, ...]) -> Reply:
    """Call the target, and sort what it raises by what the parent must do about it."""
    try:
        module, name = target.split(":")
        return outcome.OK, getattr(importlib.import_module(module), name)(*args), ""
    except Exception as error:
        status = classify(error)
        if status == outcome.OUT_OF_MEMORY:
            _free_memory()
        words = " ".join(str(error).split())
        return status, None, f"{type(error).__name__}: {words[:500]}"


def classify(error: BaseException) -> str:
    """Status for an exception; a CUDA error poisons the process and ends it."""
    kind, words = type(error).__name__, str(error)
    if kind in ("BuildError", "TemplateError", "CompilationError", "PTXASError"):
        return outcome.BUILD_ERROR
    if kind == "OutOfMemoryError" or "out of memory" in words.lower():
        return outcome.OUT_OF_MEMORY
    # the second is TileLang's, of a kernel whose shared memory nobody looked at
    if kind == "OutOfResources" or re.search(r"out of resource|dynamic shared memory", words, re.I):
        return outcome.RESOURCES
    if kind == "AcceleratorError" or "CUDA error" in words or "Triton Error [CUDA]" in words:
        return outcome.CUDA_ERROR
    return outcome.ERROR


def _free_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _exit_with(parent: int) -> None:
    """A worker stuck in a kernel must not outlive a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(4)


def main() -> None:
    faulthandler.enable()
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    code = serve(Connection(int(sys.argv[1])))
    sys.stderr.flush()
    os._exit(code)  # a broken CUDA context may hang in the interpreter's own shutdown


if __name__ == "__main__":
    main()
