"""Datasets of the HTA benchmark: fetch, check, decode once, and bring batches to the device."""
