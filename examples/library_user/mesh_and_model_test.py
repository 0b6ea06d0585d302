"""Uses the library from another workspace: `../../bazelw test //...` in this folder."""

import jax

from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.models.xlstm_parallel import xlstm_lm_model

mesh = create_mesh(MeshConfig())
assert mesh.devices.size == jax.device_count()
print(mesh, xlstm_lm_model.__name__)
