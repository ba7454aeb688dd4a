"""What the commands do, as functions that return data: `gdn2gen.tune`, `gdn2gen.warmup` and others.

wanted    problems, shapes and devices, as callers name them
explain   which recipe a call runs, and why
tune      search the present GPU, or rank for another
generate  a package of kernels, tuned first or as they are on file
every     one budget over every member and its head dims
verify    the accuracy suite, and what it files
compiled  a folder of kernels that ships in a container
mamba3    the same of Mamba-3, which is its own kernels around another's scan
warmup    compile or load in this process what calls will want

`pin` is in `store.pins`.
"""
