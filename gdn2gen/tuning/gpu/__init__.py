"""The worker that owns the GPU, and what it is asked.

backend  what the search asks of compilers and of the GPU
jobs     functions that the worker runs
parts    kernels that are in no plan, timed and checked
attempt  one config or recipe: resources, accuracy, times
"""
