"""Other libraries' models on these ops, without a change to them.

fla    register, unregister: flash-linear-attention's ops, and so its layers and models
mamba  the same: mamba_ssm's
"""
