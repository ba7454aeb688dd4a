"""What the rest stands on: nothing here knows of kernels or of linear attention.

errors       every exception; a message carries the values and the remedy
dtypes       the dtypes of tensors, and what others call them
environment  what the environment says about how kernels run
decay        how strong a call's decay is expected to be
folders      what folders can be written to, and which hold only code of this user's
paths        where templates, tuned files and generated sources live
files        a file replaced at one stroke, and the rules on what is ever written
terminal     what a reader sees: data never taken for markup, tables that are never cut
device       Device: slug, architecture, limits; of the present GPU, or of a named target
outcome      what became of one request to a worker
worker       a process for requests that may crash or hang
"""
