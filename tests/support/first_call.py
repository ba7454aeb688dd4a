"""A process as in a container: no compiler, no home, and kernels that were compiled ahead.

There is no GPU either: Triton's driver is one that loads a binary by keeping it, and launches it by
noting its name. All before that is what a first call on a GPU does. Prints what it found as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace
from typing import Any


def main(op: str, K: str, T: str, H: str, serving: str = "") -> None:
    started: list[str] = []
    written: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen":
            started.append(str(arguments[1]))
        if event == "open" and isinstance(arguments[1], str) and arguments[1].strip("rb"):
            written.append(str(arguments[0]))

    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    import gdn2gen
    from gdn2gen.codegen import programs
    from gdn2gen.family.inputs import make_inputs
    from gdn2gen.ops import _call, _decode
    from gdn2gen.runtime import prefill_op
    from gdn2gen.store import dispatch

    launched: list[str] = []

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            self.name = metadata.name

        def __call__(self, *_: Any) -> None:
            launched.append(self.name)

    driver._active = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=Launcher,
        utils=SimpleNamespace(
            load_binary=lambda *_: (1, 2, 0, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        ),
    )
    load = programs._load

    def load_and_note(path: Any) -> Any:
        load(path)  # refuses tensors that are on no GPU
        return lambda *_: launched.append(path.name.partition("-")[0])

    programs._load = load_and_note
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    _call.by_kernels = _decode.by_kernels = prefill_op.by_kernels = lambda _: True
    tensors = make_inputs(2, int(T), int(H), int(K), int(K), op=op, dtype=torch.bfloat16)
    sys.addaudithook(watch)
    begun = time.monotonic()
    with torch.no_grad():
        getattr(gdn2gen, f"chunk_{op}")(**tensors, use_qk_l2norm_in_kernel=True)
        seconds = time.monotonic() - begun
        rows = {name: x[:, :1].contiguous() for name, x in tensors.items()}
        getattr(gdn2gen, f"fused_recurrent_{op}")(**rows, use_qk_l2norm_in_kernel=True)
        if serving:
            chunk = getattr(gdn2gen, f"chunk_{op}")
            pool = torch.zeros(9, int(H), int(K), int(K))
            slots = {"state_pool": pool, "ssm_state_indices": torch.tensor([3, 4])}
            kept = {"checkpoint_every_n_tokens": 64, "checkpoint_state_indices": pool[:2, 0, 0, :1]}
            kept["checkpoint_state_indices"] = kept["checkpoint_state_indices"].long()
            begins = {"has_initial_state": torch.tensor([True, False])}
            for given in ({}, begins, kept, {**begins, **kept}):
                chunk(**tensors, **slots, **given, use_qk_l2norm_in_kernel=True)
            chunk(**tensors, return_intermediate_states=True, use_qk_l2norm_in_kernel=True)
    recipe = dispatch.find_recipe(
        gdn2gen.family.problem.Problem(op=op, K=int(K), V=int(K)),
        gdn2gen.family.problem.Regime(2 * int(T), 2, int(H)),
        gdn2gen.base.device.named_device("sm_90"),
    )
    found = {"seconds": seconds, "launched": launched, "started": started, "written": written}
    found["imported"] = sorted({"tilelang"} & {*sys.modules})
    print(json.dumps({**found, "source": recipe.source, "why": recipe.why}))


if __name__ == "__main__":
    main(*sys.argv[1:])
