"""A recurrent machine whose state is one code: `model` (the cell, and its table of transitions) → `training`."""
