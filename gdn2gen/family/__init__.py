"""What is computed: problems, sizes, inputs, and the reference that is the only truth.

problem     Problem (compiled in) and Regime (known at run time)
shapes      the named shapes that tuning and benchmarks speak of
inputs      random inputs with gentle or hostile gates
reference   the recurrence in fp64, and its chunk form
tolerances  how far from exact a kernel may be
"""
