"""The commands, one module per group.

program   the command line itself
options   options that several commands share
inspect   explain, generate
verify    verify
measure   bench
compiled  compile
tune      tune, quick
tuned     export, import, merge and compare tuned files
ledger    what the tuner refused
report    what the tuner found
"""
