"""Ablations: what each part of TCPA brings, on a dataset or on the demo's digits.

`studies` lists what is varied, `runs` trains it, `tables` and `figures` show it.
"""
