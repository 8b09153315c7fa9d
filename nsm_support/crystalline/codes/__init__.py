"""Discrete codes: the bottleneck, a transformer whose sublayers pass it, and how codes align with states."""
