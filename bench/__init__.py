"""Measurements: what TCPA costs here, against what one would use instead."""
