"""How long tests wait for what must come."""

# Seconds. Only what hangs takes so long, on a machine many times slower than ours, too.
PATIENCE = 900
