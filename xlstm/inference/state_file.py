"""Saved states: files from which texts can be continued later."""

import io
import json
import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from xlstm.dataset.detokenizer import DetokenizerState
from xlstm.files import write_atomically
from xlstm.inference.decode import DecodeState
from xlstm.inference.generate import GenerationState
from xlstm.inference.loaded_model import LoadedModel
from xlstm.models.xlstm_parallel.config import LanguageModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import initial_state
from xlstm.trainer.base.multihost import to_host

# The names of arrays in the file, besides the fields of `DecodeState`.
_FINGERPRINT, _DETOKENIZER_STATES = "checkpoint", "texts"


def save_state(path: str, state: GenerationState, model: LoadedModel) -> None:
    """Writes the state of a batch of texts.

    All processes must call this function; process 0 writes the file.

    Args:
        path: The file.
        state: The state that `generate_text` returned.
        model: The model that generated the texts.

    Raises:
        OSError: If the file cannot be written.
    """
    arrays = {name: to_host(x) for name, x in _named_leaves(state.decode_state).items()}
    states = [[x.is_first, x.pending.hex(), x.unsure.hex()] for x in state.detokenizer_states]
    arrays |= {
        _FINGERPRINT: np.array(model.fingerprint),
        _DETOKENIZER_STATES: np.array(json.dumps(states)),
    }
    if jax.process_index() == 0:
        content = io.BytesIO()
        np.savez(content, **arrays)
        write_atomically(path, content.getvalue())


def load_state(path: str, model: LoadedModel) -> GenerationState:
    """Reads the state of a batch of texts.

    Args:
        path: A file that `save_state` wrote.
        model: The same model, on any mesh.

    Returns:
        The state, to pass to `generate_text`.

    Raises:
        ValueError: If the file is not a saved state, or belongs to another checkpoint.
        OSError: If it cannot be read.
    """
    try:
        arrays = _read_arrays(path)
    except OSError:
        raise
    except Exception as error:  # A damaged file may raise anything.
        raise ValueError(f"{path} is not a saved state: {error}") from error
    fingerprint = str(arrays.pop(_FINGERPRINT, ""))
    if fingerprint != model.fingerprint:
        raise ValueError(
            f"{path} was saved with another checkpoint: its fingerprint is"
            f" {fingerprint[:12] or 'missing'}, expected {model.fingerprint[:12]}"
        )
    batch_size = np.size(arrays.get("done", ()))
    states = _detokenizer_states(path, arrays.pop(_DETOKENIZER_STATES, None), batch_size)
    like = _abstract_decode_state(model.config, batch_size)
    expected = _named_leaves(like)
    shapes = {name: x.shape for name, x in arrays.items()}
    has_shapes = shapes == {name: x.shape for name, x in expected.items()}
    if not (batch_size and has_shapes) or any(x.dtype.kind not in "bif" for x in arrays.values()):
        raise ValueError(
            f"{path} is not a saved state of this model: its arrays have other names, shapes or"
            " types"
        )
    if any(np.isnan(x).any() for x in arrays.values()):
        raise ValueError(f"{path} contains NaN: expected finite states")
    leaves = [arrays[name].astype(x.dtype) for name, x in expected.items()]
    return GenerationState(jax.tree.unflatten(jax.tree.structure(like), leaves), states)


def _named_leaves(decode_state: DecodeState) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(decode_state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _abstract_decode_state(config: LanguageModelConfig, batch_size: int) -> DecodeState:
    """Returns the shapes and dtypes of a `DecodeState`."""
    logits = jax.ShapeDtypeStruct((batch_size, config.model.vocab_size), jnp.float32)
    count = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return DecodeState(
        logits=logits,
        state=jax.eval_shape(lambda: initial_state(config, batch_size)),
        seen=logits.update(dtype=bool),
        num_tokens=count,
        done=count.update(dtype=bool),
    )


def _read_arrays(path: str) -> dict[str, np.ndarray]:
    """Reads an uncompressed `.npz` file, so that the arrays are no larger than the file."""
    with np.load(path, allow_pickle=False) as file:
        entries = file.zip.infolist()
        is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not is_stored or sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise ValueError("its arrays are compressed")
        return dict(file)


def _detokenizer_states(
    path: str, saved: np.ndarray | None, batch_size: int
) -> list[DetokenizerState]:
    """Decodes the detokenizer states; older files have none, and end with complete characters."""
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
        raise ValueError(
            f"{path} is not a saved state: its detokenizer states cannot be read"
        ) from error
