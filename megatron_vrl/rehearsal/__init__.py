"""Rehearsal: an update of the real size and layout on fake tensors, counted and not computed."""
