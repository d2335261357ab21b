"""Gated attention: attention to tokens and prompts with one visibility bit per prompt."""
