"""Prompt matching, alone and with LayerNorm."""
