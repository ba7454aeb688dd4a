"""Tuned files, and which recipe they give a call.

format       what a tuned file says, as text and as dataclasses
tuned_files  tuned/<op>/<gpu>.json: read, merged under a lock, replaced at one stroke
candidate    a whole pipeline in a form that crosses process borders
dispatch     (problem, regime, device) to Recipe, and why
sharing      tuned files between machines
"""
