"""What a reader sees of a search.

charts    small charts as inline SVG
lines     what is on file for a GPU, line by line
parts     the same of kernels that are in no plan
page      one self-contained page
progress  what is shown while the tuner works
report    what a run found, tried and refused
"""
