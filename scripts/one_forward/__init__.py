"""The forward of GDN-2 and KDA in one kernel, in TileLang for sm_90: no workspace in memory.

Two programs, a cluster, take a head of a sequence, each half of its values. Of either program one
group of 128 threads scans, and two prepare, in turn, each every fourth chunk, into a slot of its
own in shared memory, of which the other program gets a copy:

    chunk        0         1         2         3         4      ...
    program      0         1         0         1         0
    group        0         0         1         1         0
    slot         0         1         2         3         0

A slot is `full` once it was made and copied, `empty` once both programs have scanned it. What a
group reads it loads itself, one chunk ahead: no group only loads. The equations are those of the
stages prepare and scan; a chunk in which a channel loses more than 2^-RANGE is scored frame by
frame (`frames`), and so is exact, too.

K = V = 128, chunks of 32, bf16 with g in fp32, q and k normalised here. An experiment: no plan has
it, and `one_forward_time.py` says what it takes.
"""
