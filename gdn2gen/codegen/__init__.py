"""From a problem and a config to text, a module, a compiled kernel.

templates    Jinja's environment, and digests of what a template says
context      what templates are given
render       template to source
digests      of the templates that a recipe is made from
build        source to module to compiled kernel, ahead of time for any target
faults       what compilers are known to get wrong, in what they made
interpreter  Triton's interpreter, mended and taught bf16
hasten       Triton's interpreter without most of its own time
shortcuts    what it does to tiles, by NumPy alone from the second time on
nvrtc        CUDA source compiled without a CUDA toolkit
direct       launches without Triton's argument binder
fixed        launches of one kernel whose scalars never change
choosing     several items of a sequence at once
frames       a pass's launches with arguments that lie ready: a call writes addresses
sized        launches whose grids and scalars are worked out once
programs     TileLang's compiled programs kept, and run without TileLang
shipped      kernels compiled ahead, in a folder that is only read
ship         the folder written
overlay      Triton's cache with that folder in front of it
package      packages of kernels that need no gdn2gen
background   programs of a pass compiled by threads
"""
