"""One call: from checked arguments to launches.

dtypes           torch's dtypes by the names of problems
sequences        packed batches as the host knows them
signature        how the ops of a recurrence take their arguments, made of its declaration
arguments        checks of a call's tensors; bad input never reaches a kernel
options          checks of its options
head_dims        head dims of a call, verified on such a GPU
call             sizes and scalars of a call, by symbols
kinds            calls that are known, by what of their tensors decides
bound            a pass bound to its launches: buffers at offsets, one look at addresses
passes           workspace and launches of one direction
layout           what a forward saves as one buffer, for tracers
runner           a recipe with its kernels loaded
lookup           what shapes, dtypes and flags of a call decide, looked up once
autograd         the ops in torch.library, and autograd's own Function
decoding_checks  checks of what a call over a few tokens takes beside
decoding         such a call's kernel, and what its shapes, strides, dtypes and flags decide
decoding_op      its op in torch.library
prefill_checks   checks of what a call over whole sequences takes for serving
prefill          such a call: kernels between slots of a pool and the stages, states on the way
prefill_op       its op in torch.library
room             where gradients of several tensors lie, for one matrix product
parts            launches of the kernels of a layer's parts
part_calls       calls of these that are like one before
parts_ops        their ops in torch.library, and autograd's own Functions
decay_gate       a decay's gate by itself: launches, calls like one before, its ops
gates            whether a call has its decay's gate apart
stream_parts     launches between a model's mixers: the residual stream's norm, SwiGLU
mamba3_loaded    the kernels around Mamba-3's scan, and of its one token: forced, tuned or by a rule
mamba3           their launches
mamba3_ops       the ops of the former in torch.library, and autograd's own Functions
mamba3_reverse_scan    the products of its backward in one stage: where, and launches
mamba3_turning_scan    its scan that turns queries and keys itself: where, and launches
mamba3_chunks    launches of Mamba-3's own kernels over chunks
mamba3_chunk_ops  its op in torch.library, and autograd's own Function
"""
