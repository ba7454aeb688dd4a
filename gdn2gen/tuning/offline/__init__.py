"""What can be done for a named target where no GPU is.

run       compile, check, rank, file as predicted
predict   how configs compare by what the compiler reports
findings  what was found out, on file as it happens
"""
