"""Is it right, and how fast is it: shared by bench, verify, the tuner and the tests.

accuracy     errors against the fp64 reference
timing       the timing protocol, and the floor that times are held against
turn         several measurements that share one GPU
compiling    kernels compiled side by side, before a process loads them
peers        what other libraries have of a recurrence, called as ours is
sides        one implementation at one shape: ours, or a peer's
rows         one row of a benchmark per shape, and stage by stage
results      a table, and a file of results per GPU
cases        the cases of the accuracy suite
case_runs    one case run: accuracy, causality, repetition
decode_runs  one case of decoding run: calls as servers and layers make them
check        no config is timed before its results are right and repeat
suite        the accuracy suite, for the GPU or the interpreter
mamba3_cases  Mamba-3's cases of it
mamba3_runs   one of these run
mamba3_times  times of Mamba-3's kernels, and their least bytes
mamba3_rows   a benchmark's rows of it
"""
