#!/bin/sh
# Orbax keeps a checkpoint with a loss of NaN as the best and removes better ones.
#
# Expected: with `best_fn` and `best_mode="min"` the checkpoints with the lowest losses are kept, and
#   one whose loss is NaN counts as the worst.
# What happens: the checkpoints are sorted by their metric, and a sort compares wrongly where one of
#   the numbers is NaN. What is kept depends on the order: a NaN after a good loss takes its place and
#   is given as the best step, and the checkpoint with the lowest loss is removed.
# Version: orbax-checkpoint 0.12.8.
# Decided in: orbax/checkpoint/_src/checkpoint_managers/preservation_policy.py, BestN (what is kept), and
#   orbax/checkpoint/checkpoint_manager.py, CheckpointManager._sort_checkpoints_by_metrics (the best).
#
# Output:
#   losses [3.0, 4.0], 1 kept: [3.0], best 3.0
#   losses [nan, 3.0], 1 kept: [3.0], best 3.0
#   losses [3.0, nan], 1 kept: [nan], best nan
#   losses [3.0, 1.0, nan, 2.0], 2 kept: [nan, 2.0], best 2.0
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import logging
import os

import numpy as np
from orbax.checkpoint import CheckpointManager, CheckpointManagerOptions
from orbax.checkpoint.args import StandardSave

logging.disable(logging.CRITICAL)


def show(losses, keep):
    options = CheckpointManagerOptions(
        max_to_keep=keep, best_fn=lambda metrics: metrics["loss"], best_mode="min"
    )
    folder = os.path.abspath(f"{losses} {keep}")
    with CheckpointManager(folder, options=options) as manager:
        for step, loss in enumerate(losses):
            manager.save(step, args=StandardSave({"w": np.ones(2)}), metrics={"loss": loss})
        manager.wait_until_finished()
        kept = [losses[step] for step in manager.all_steps()]
        print(f"losses {losses}, {keep} kept: {kept}, best {losses[manager.best_step()]}")


nan = float("nan")
show([3.0, 4.0], 1)
show([nan, 3.0], 1)
show([3.0, nan], 1)
show([3.0, 1.0, nan, 2.0], 2)
PYTHON
JAX_PLATFORMS=cpu venv/bin/python finding.py 2>/dev/null | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
