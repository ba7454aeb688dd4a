"""How it is computed, without source text and without torch: stages, their forms, plans, configs.

limits      where a kernel is to run, and what its knobs may be there
slices      a head dim in slices whose widths are powers of two
languages   what every kernel of a language is limited to
rows        rows of a token that lie apart in memory
stage       what a stage's contract and its forms are declared in
operands    what stages read of the op's inputs, and hand to each other
glossary    what each operand is, in words
anchors     how far factors may lie from their anchor
feedback    where what rounding takes of a chunk's inverse goes to its neighbours
prepare     prepare, reprepare, sum_decay: contracts and forms
scans       scan, scan_states, rescan, reverse_scan
gradients   grad_value, grad_key
blocks      the stages of plans that keep the state of every few chunks
outside_blocks   their gradients where the decay is outside of products
transitions  the stages of plans that keep the transitions of segments for their backward
whole       prepare and scan in one kernel
groups      the stages of members whose heads share the scores of a group
recurrent   the stage of the mode that goes token by token
parts       the stages of a layer's parts: short convolutions, the gated norm
stream_parts  those between a model's mixers: the residual stream's norm, SwiGLU
mamba3      the stages around Mamba-3's scan
mamba3_chunks    those of Mamba-3 by kernels of its own, over chunks
mamba3_scan      its states and outputs in one stage, and where that runs
mamba3_turning_scan    its states and outputs in one stage that turns queries and keys itself
mamba3_reverse_scan    the products of its backward in one stage, and what adds up the rest
stages      every stage by its name
extras      knobs that a config may have beside those of its form
config      one set of knobs of a stage; the one without tuning
validity    which configs can serve a problem
options     which calls a config serves of those that find what is filed for its problem
floor       bytes and time that no kernel can do without
plans       chains of stages, and the levels that they serve
recipe      Recipe: problem, plan, configs
schedule    a recipe's launches in order, and when their buffers live
"""
