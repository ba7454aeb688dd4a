"""What the tuner keeps on disk.

places   where the records of a GPU lie
journal  the journal file that studies lie in
storage  where studies lie, and how one is opened
ledger   configs that were refused, and why
entries  entries of tuned files as the tuner sees them
stored   recipes on file, which a search begins with
"""
