"""Strategies that decide which blocks stay, one file each behind one small interface. None is written yet.

Today selection is the gates' own: a score, a threshold and a penalty (`slora.gate`).
"""
