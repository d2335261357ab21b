"""Ablations: what each part of TCPA brings, on a dataset or on the demo's digits.

`studies` lists what is varied, `digits` and `datasets` train it, `tables` and `figures` show it.
"""
