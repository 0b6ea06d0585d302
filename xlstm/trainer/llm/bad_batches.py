"""Keeps the batch of a step for whoever wants to know what was wrong with it."""

import dataclasses
import io
import json
import os

import jax
import numpy as np

from xlstm.dataset.data import Data
from xlstm.files import write_atomically


def dump_batch(data: Data, directory: str, step: int) -> str:
    """Writes the global batch of a step, and where its rows come from.

    Args:
        data: What the run reads.
        directory: Where `step_<step>.npz` (the arrays of the batch) and `step_<step>.json` (for
            each row, its store and its documents) go.
        step: The step, counted from 1.

    Returns:
        A clause that names documents and file.
    """
    origins = data.batch_origins(step - 1)
    path = os.path.join(directory, f"step_{step}")
    if jax.process_index() == 0:
        batch = next(iter(data.train_batches(start_step=step - 1)))
        arrays = io.BytesIO()
        np.savez_compressed(arrays, **dataclasses.asdict(batch))
        os.makedirs(directory, exist_ok=True)
        write_atomically(f"{path}.npz", arrays.getvalue())
        rows = [dataclasses.asdict(origin) for origin in origins]
        write_atomically(f"{path}.json", json.dumps(rows, indent=1) + "\n")
    documents: dict[str, list[str]] = {}
    for origin in origins:
        first, last = origin.first_document, origin.last_document
        documents.setdefault(origin.store, []).append(
            str(first) if first == last else f"{first}-{last}"
        )
    named = "; ".join(
        f"documents {', '.join(numbers)} of {store}" for store, numbers in documents.items()
    )
    return f"its batch ({named}) is in {path}.npz"
