"""A file that holds how far texts are, so that they can be continued later."""

import io
import json
import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from xlstm.dataset.detokenizer import DetokenizerState
from xlstm.files import write_atomically
from xlstm.inference.decode import Progress
from xlstm.inference.generate import TextsSoFar
from xlstm.inference.load_model import LoadedModel
from xlstm.models.xlstm_parallel.config import LanguageModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import initial_state
from xlstm.trainer.base.multihost import to_host

_FINGERPRINT, _STATES = "checkpoint", "texts"


def _named_leaves(progress: Progress) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(progress)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _like(config: LanguageModelConfig, batch_size: int) -> Progress:
    """The shapes and types of how far the texts of a batch are."""
    logits = jax.ShapeDtypeStruct((batch_size, config.model.vocab_size), jnp.float32)
    count = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return Progress(
        logits=logits,
        state=jax.eval_shape(lambda: initial_state(config, batch_size)),
        seen=logits.update(dtype=bool),
        num_tokens=count,
        done=count.update(dtype=bool),
    )


def save_progress(path: str, texts: TextsSoFar, model: LoadedModel) -> None:
    """Writes how far texts are; all processes must call it, and the first one writes.

    Args:
        path: The file.
        texts: How far the texts are.
        model: The model that wrote them.

    Raises:
        OSError: If it cannot be written.
    """
    arrays = {name: to_host(x) for name, x in _named_leaves(texts.progress).items()}
    states = [[x.is_first, x.pending.hex(), x.unsure.hex()] for x in texts.states]
    arrays |= {_FINGERPRINT: np.array(model.fingerprint), _STATES: np.array(json.dumps(states))}
    if jax.process_index() == 0:
        content = io.BytesIO()
        np.savez(content, **arrays)
        write_atomically(path, content.getvalue())


def load_progress(path: str, model: LoadedModel) -> TextsSoFar:
    """Reads what `save_progress` wrote.

    Args:
        path: The file.
        model: The model that goes on; on any mesh.

    Returns:
        How far the texts are.

    Raises:
        ValueError: If it is no such file, or of another checkpoint.
        OSError: If it cannot be read.
    """
    try:
        arrays = _read_arrays(path)
    except OSError:
        raise
    except Exception as error:  # Damage in it may raise anything.
        raise ValueError(f"{path} is not a saved state: {error}") from error
    fingerprint = str(arrays.pop(_FINGERPRINT, ""))
    if fingerprint != model.fingerprint:
        raise ValueError(
            f"{path} was saved with another checkpoint (fingerprint {fingerprint[:12] or 'none'},"
            f" this one has {model.fingerprint[:12]})"
        )
    batch_size = np.size(arrays.get("done", ()))
    states = _states(path, arrays.pop(_STATES, None), batch_size)
    like = _like(model.config, batch_size)
    wanted = _named_leaves(like)
    shapes = {name: x.shape for name, x in arrays.items()}
    is_alike = shapes == {name: x.shape for name, x in wanted.items()}
    if not (batch_size and is_alike) or any(x.dtype.kind not in "bif" for x in arrays.values()):
        raise ValueError(f"{path} is not a saved state of this model: its arrays are others")
    if any(np.isnan(x).any() for x in arrays.values()):
        raise ValueError(f"{path} is not a state that texts can go on from: it holds NaN")
    found = [arrays[name].astype(x.dtype) for name, x in wanted.items()]
    return TextsSoFar(jax.tree.unflatten(jax.tree.structure(like), found), states)


def _read_arrays(path: str) -> dict[str, np.ndarray]:
    """The arrays of a file that `np.savez` wrote: together they are no larger than the file."""
    with np.load(path, allow_pickle=False) as file:
        entries = file.zip.infolist()
        is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not is_stored or sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise ValueError("its arrays are not stored as they are")
        return dict(file)


def _states(path: str, saved: np.ndarray | None, batch_size: int) -> list[DetokenizerState]:
    """What the texts left open; files that do not say it were written at ends of characters."""
    if saved is None:
        return [DetokenizerState(is_first=False)] * batch_size
    try:
        states = [
            DetokenizerState(bool(is_first), bytes.fromhex(pending), bytes.fromhex(unsure))
            for is_first, pending, unsure in json.loads(str(saved))
        ]
        if len(states) not in (0, batch_size):
            raise ValueError(f"{len(states)} texts, {batch_size} rows")
        return states
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a saved state: its texts cannot be read") from error
