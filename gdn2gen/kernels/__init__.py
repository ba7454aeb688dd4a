"""How it is computed, without source text and without torch: stages, plans, configs.

stages    each stage's contract: operands, bytes, operations
glossary  what each operand is, in words
floor     bytes and time that no kernel can do without
plans     chains of stages, and the levels that they serve
anchors   how far factors may lie from their anchor
config    knobs, domains, defaults
validity  which configs can serve a problem
"""
