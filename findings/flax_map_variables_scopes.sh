#!/bin/sh
# nn.map_variables calls its two functions once for each scope that a module involves, not once.
#
# Expected: trans_in_fn gets the variables of the module, and trans_out_fn gets them after the call,
#   so a closure can keep the former to merge the latter into them, such as one row of a state.
# What happens: if the module holds a submodule that its parent owns, the submodule's scope is mapped
#   by a call of its own: trans_in_fn runs twice, the second time with {} (the module owns nothing),
#   and then trans_out_fn runs twice in the same order. What the closure kept is the {}. If the module
#   owns the submodule, there is one call, so code that is tried with that breaks in a parent.
# Version: flax 0.12.8; jax 0.10.2.
# Decided in: flax/core/lift.py, map_variables, which maps each group of variables of `pack`.
#
# Output:
#   owned by the module: in {'cell': {'n': 0.0}}, out {'cell': {'n': 1.0}}
#   owned by its parent: in {'n': 0.0}, in {}, out {'n': 1.0}, out {}
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet jax==0.10.2 flax==0.12.8 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import flax.linen as nn
import jax
import jax.numpy as jnp


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x):
        count = self.variable("counts", "n", lambda: jnp.zeros(()))
        count.value += 1
        return x


class Stage(nn.Module):
    shared: nn.Module | None = None

    def setup(self):
        self.cell = self.shared or Cell()

    def __call__(self, x):
        return self.cell(x)


class Model(nn.Module):
    shares: bool

    def setup(self):
        self.cell = Cell() if self.shares else None
        self.stage = Stage(self.cell)

    def __call__(self, x):
        def show(name):
            def mapped(variables):
                seen.append(f"{name} {jax.tree.map(float, variables.get('counts', {}))}")
                return variables

            return mapped

        run = nn.map_variables(
            lambda stage, x: stage(x), "counts", show("in"), show("out"), mutable=True
        )
        return run(self.stage, x)


for shares, where in ((False, "by the module"), (True, "by its parent")):
    counts = {"cell": {"n": jnp.zeros(())}}
    seen, variables = [], {"counts": counts if shares else {"stage": counts}}
    Model(shares).apply(variables, 1.0, mutable=["counts"])
    print(f"owned {where}: {', '.join(seen)}")
PYTHON
JAX_PLATFORMS=cpu venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
