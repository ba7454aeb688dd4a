"""The program: its arguments, its tiles and barriers, and who does what."""

# mypy: disable-error-code="valid-type, untyped-decorator"
from types import SimpleNamespace
from typing import Any, Final

from one_forward.prepare import prepare_of
from one_forward.scan import scan_of
from one_forward.sizes import BT, BV, COPIES, GROUP, GROUPS, IO, SLOTS, WARPS, K, V

PASSES: Final = {
    "tl.enable_fast_math": True,
    # roles and barriers are all written out
    "tl.disable_warp_specialized": True,
    "tl.disable_thread_storage_sync": True,
    "tl.disable_shared_memory_reuse": True,
    # what a warp does with T and with Aqk is decided once, not for each of its elements
    "tl.loop_unswitching_allow_non_trivial_else": True,
}


def program(
    op: str = "gdn2",
    keeps: bool = True,
    starts: bool = False,
    frames: bool = True,
    without: str = "",
) -> Any:
    """The program, for any number of sequences, tokens and heads.

    `op`: gdn2, or kda, whose beta is b here, and which reads no w. `keeps`: what plan lean keeps
    for the backward is written, too. `starts`: from an initial state. `frames`: with
    `later_frames`. `without`: "scan" or "prepare" has its waits and signals alone, so that the time
    is the other's (and the results are not).
    """
    import tilelang.language as tile

    B, T, H, NT, NS = (tile.dynamic(x) for x in ("B", "T", "H", "NT", "NS"))
    tied = op == "kda"
    erase = [B, T, H] if tied else [B, T, H, K]
    scan = scan_of(tile, tied, keeps, starts, without != "scan")
    prepare = prepare_of(tile, tied, keeps, frames, without != "prepare")

    @tile.prim_func
    def forward(
        q: tile.Tensor([B, T, H, K], IO),
        k: tile.Tensor([B, T, H, K], IO),
        v: tile.Tensor([B, T, H, V], IO),
        g: tile.Tensor([B, T, H, K], "float32"),
        b: tile.Tensor(erase, IO),
        w: tile.Tensor([B, T, H, V], IO),
        initial_state: tile.Tensor([B, H, K, V], "float32"),
        o: tile.Tensor([B, T, H, V], IO),
        final_state: tile.Tensor([B, H, K, V], "float32"),
        q_rstd: tile.Tensor([NT, H, BT], "float32"),
        k_rstd: tile.Tensor([NT, H, BT], "float32"),
        A: tile.Tensor([NT, H, BT, BT], IO),
        Aqk: tile.Tensor([NT, H, BT, BT], IO),
        S_seg: tile.Tensor([B, H, NS, V, K], "float32"),
        scale: tile.float32,
        segment: tile.int32,
    ) -> None:
        threads = GROUP * (1 + GROUPS)
        with tile.Kernel(2, H, B, threads=threads, cluster_dims=2) as (i_v, i_h, i_b):
            s_rows = tile.alloc_shared([SLOTS, 2 * BT, K], IO)  # -E, then Y = -A E; and Qg
            s_keys = tile.alloc_shared([SLOTS, BT, K], IO)  # k / gamma, then Ktail
            s_A = tile.alloc_shared([SLOTS, BT, BT], IO)
            s_Aqk = tile.alloc_shared([SLOTS, BT, BT], IO)
            s_gamma = tile.alloc_shared([SLOTS, K], "float32")
            s_v = tile.alloc_shared([2, BT, BV], IO)
            s_w = None if tied else tile.alloc_shared([2, BT, BV], IO)
            s_o = tile.alloc_shared([BT, BV], IO)
            full = tile.alloc_cluster_barrier([COPIES] * SLOTS)
            empty = tile.alloc_cluster_barrier([2 * WARPS] * SLOTS)
            loaded = tile.alloc_barrier([1] * GROUPS)
            values = tile.alloc_barrier([1] * 2)
            x = SimpleNamespace(
                q=q, k=k, v=v, g=g, b=b, w=w, initial_state=initial_state, o=o,
                final_state=final_state, q_rstd=q_rstd, k_rstd=k_rstd, A=A, Aqk=Aqk, S_seg=S_seg,
                scale=scale, segment=segment,
            )  # fmt: skip
            own = SimpleNamespace(
                i_v=i_v, i_h=i_h, i_b=i_b, T=T, n_chunks=tile.ceildiv(T, BT), s_rows=s_rows,
                s_keys=s_keys, s_A=s_A, s_Aqk=s_Aqk, s_gamma=s_gamma, s_v=s_v, s_w=s_w, s_o=s_o,
                full=full, empty=empty, loaded=loaded, values=values,
            )  # fmt: skip

            # one chain of branches: after several apart ptxas would wait for each product
            if tile.get_thread_binding() < GROUP:
                scan(x, own)
            elif tile.get_thread_binding() < 2 * GROUP:
                prepare(x, own, 0)
            else:
                prepare(x, own, 1)
            # the other program may write here, and be written to, until both are through
            tile.cluster_sync()

    return forward
