"""Tuned files, and which recipe they give a call.

format       what a tuned file says, as text and as dataclasses
tuned_files  tuned/<op>/<gpu>.json: read, merged under a lock, replaced at one stroke
ranking      which of several entries is better, and what others of its size are for
part_files   tuned/<op>/parts/<gpu>.json: knobs of kernels that are in no plan
decoding     tuned/<op>/decoding/<gpu>.json: knobs of one token a sequence, in slots
surroundings  what look-ups depend on besides their arguments, read once
dispatch     (problem, regime, device) to a recipe, and why
gates        whether a call has its decay's gate apart
mamba3       what a call of Mamba-3 runs: knobs of its kernels, or a scan's recipe beside them
pins         recipes of a process as data, and taken by another
verified     what the accuracy suite has passed, by architecture
sizes        head dims that were never tuned: the recipe of the nearest ones
sharing      tuned files between machines
"""
