"""What the experiments on learning share: `scripts/recall.py` and `scripts/text.py`.

tasks        sequences that ask for what they said before, made on the device from a seed
corpus       bytes of the Python that runs this, cut into what is trained on and what is held out
models       the mixers side by side: same sizes, or as many parameters; parts of GDN-2 alone
training     one run, several at a time, each a CUDA graph on a stream of its own
rows         runs and what came out of them, a file each; those that are still wanting
report       tables with confidence intervals
plots        curves with such intervals as SVG, on a light page and a dark one
recall_plan  what all runs of recall share
recall_page  tables and pictures of what came out of them
text_plan    what all runs of text share
text_page    table and pictures of what came out of them
mamba_peers  our layers of Mamba on mamba_ssm's ops
speed        tokens a second of the models of text, ours and the peers' in turns
speed_page   their table
autotuning   peers' autotuners, told to hurry
"""
