"""What is computed: recurrences, problems, sizes, inputs, and the reference, the only truth.

recurrence          Recurrence: a member of the family, declared once
gdn2                Gated DeltaNet-2
kda                 Kimi Delta Attention
gated_delta_rule    Gated DeltaNet
delta_rule          DeltaNet
gla                 Gated linear attention
simple_gla          the same with one decay per head
mamba2              Mamba-2's own recurrence, which simple_gla's kernels serve
mamba3              Mamba-3's own recurrence
mamba3_form         what comes before and after simple_gla's one pass that computes it
mamba3_problem      Mamba3Problem: what kernels of those are made for
registry            the members by name
problem             Problem (compiled in) and Regime (known at run time)
compiled            what kernels ask of any problem
decoding            DecodingProblem: the same token by token, with states in place
prefill             PrefillProblem: whole sequences, whose states are kept on the way
shapes              the named shapes that tuning and benchmarks speak of
decays              DecayPattern: decays that trained gates had, on file
strength            how strong a decay is, by the chunks that one anchor does not reach
inputs              random inputs whose decay is gentle or hostile
activations         what the decay, q and k pass through first
reference           the recurrences in fp64, and their chunk form
decoding_reference  what that computes, and which slots of a pool it reads and writes
prefill_reference   the same of whole sequences
parts               PartProblem: a layer's short convolutions, its gated norm
parts_reference     what those compute, by torch's own operations
tolerances          how far from exact a kernel may be
"""
