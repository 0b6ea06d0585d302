"""How long a test waits for something that must happen."""

# Seconds. Only something that hangs takes this long, even on a machine many times slower than ours.
PATIENCE = 900
