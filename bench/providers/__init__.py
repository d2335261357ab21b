"""Ways to compute the same thing, to be raced: attention, matching, whole steps."""
