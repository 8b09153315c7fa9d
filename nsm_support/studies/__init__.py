"""Studies: one training, measured, for every thread. Only pages import these."""
