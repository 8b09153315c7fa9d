"""Discrete codes in a transformer. To be read in this order:

`schedules` (how noise goes down in training) → `bottleneck` (a vector becomes a code, and the two losses of it) →
`transformer` (sublayers that pass it) → `alignment` (how codes and a machine's states belong together).
"""
