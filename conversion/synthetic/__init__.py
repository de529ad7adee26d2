"""Recall on synthetic tasks and length generalisation: tasks, models of equal size, training, store and report."""
