"""Sequence mixers that several threads use: selective scan, Mamba, rotary positions, and the baselines."""
