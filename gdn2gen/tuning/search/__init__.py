"""Which config next, and which recipe wins.

climb      proposals next to what was best so far
trials     the Optuna study of one stage at one chunk size
opening    each chunk size's default, before its trials
loop       configs of all stages compiled, checked and timed as they come
sums       what the best recipe of a plan takes, by its stages
finalists  whole recipes, checked in full and timed in turns
verdicts   which recipe wins
"""
