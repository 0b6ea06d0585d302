"""Import and export of models in the Hugging Face format, a few tensors in memory at a time.

All checks come before the first write, except of the numbers themselves. The target folder gets its
name only when it is complete.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore
from safetensors import safe_open

from xlstm.dataset.config import DataConfig
from xlstm.dataset.json_tokenizer import parse_tokenizer
from xlstm.dataset.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer, find_markers
from xlstm.distributed.mesh import MESH_AXES
from xlstm.files import find_file, inner_path, new_folder, read_json
from xlstm.huggingface.layout import (
    HFTensor,
    describe_ignored_fields,
    from_hf_config,
    hf_tensors,
    parameter_shapes,
    to_hf_config,
)
from xlstm.huggingface.safetensors_files import (
    check_tensors,
    count_elements,
    open_tensors,
    write_json,
    write_tensors,
)
from xlstm.huggingface.tokenizer import (
    find_tokenizer,
    write_byte_tokenizer_files,
)
from xlstm.trainer.base.param_utils import nonfinite_text
from xlstm.trainer.checkpoints.folder import (
    CheckpointFolder,
    CheckpointMetadata,
    reading_checkpoint,
)
from xlstm.trainer.checkpoints.read_params import open_params, read_run_info
from xlstm.trainer.checkpoints.storage import STATE_DIR, as_os_error, check_storage_path
from xlstm.trainer.checkpoints.streamed_arrays import StreamedArray, write_streamed_arrays
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.run_facts import code_version
from xlstm.trainer.llm.run_tokenizer import (
    TOKENIZER_FILES,
    copy_files,
    eos_ids,
    read_tokenizer,
    write_markers,
)
from xlstm.trainer.llm.workdir import Workdir, run_info, write_config

_CONFIG_FILE, _GENERATION_FILE = "config.json", "generation_config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class ConversionSummary:
    """Summary of a conversion.

    Attributes:
        num_parameters: The number of parameters.
        num_bytes: Their size in bytes.
        num_files: The number of safetensors files; None for an import.
        notes: Notes for the user, one line each.
    """

    num_parameters: int
    num_bytes: int
    num_files: int | None = None
    notes: tuple[str, ...] = ()


def import_model(
    source: str,
    target: str,
    report: Callable[[int, int], None],
    *,
    eod_token: str | None = None,
    refuse_nonfinite: bool = False,
) -> ConversionSummary:
    """Imports a model in the Hugging Face format as a run folder with one checkpoint, of step 0.

    The checkpoint holds the parameters only, in float32. The run folder also gets the model's
    tokenizer, if it has one, and its `generation_config.json`.

    Args:
        source: The model's folder.
        target: The run folder to create.
        report: Called with the number of parameters written so far, and of all parameters.
        eod_token: The token that ends documents; None for the one that the model's files name.
        refuse_nonfinite: Whether infinite and NaN parameters are an error instead of a note.

    Returns:
        A summary of what was written.

    Raises:
        ValueError: If the model, its files or its tokenizer are not supported, a parameter is
            rejected, or the target exists.
        OSError: If a file cannot be read or written.
    """
    check_storage_path(target)
    model = _check_source(source, eod_token)
    config, tokenizer, notes = model.config, model.tokenizer, model.notes
    tensors = hf_tensors(model.shapes)
    with new_folder(target) as folder:
        workdir = Workdir(folder)
        copy_files(source, folder, TOKENIZER_FILES)
        write_json(os.path.join(folder, _GENERATION_FILE), model.generation)
        reader = _TensorReader(functools.partial(_read_tensor, model.files), tensors, report)
        parts = {
            f"params.{name}": _array_parts(
                reader.read, shape, [x for x in tensors if x.parameter == name]
            )
            for name, shape in model.shapes.items()
        }
        checkpoints = CheckpointFolder(workdir.checkpoints)
        checkpoints.begin(0)
        with as_os_error(f"the parameters cannot be written to {target}"):
            write_streamed_arrays(os.path.join(checkpoints.unfinished_dir(0), STATE_DIR), parts)
        notes += reader.check(source, refuse_nonfinite)
        if tokenizer and tokenizer.definition is not None:
            write_markers(workdir, tokenizer)
        mesh = dict.fromkeys(MESH_AXES, 1)
        checkpoints.finalize(
            0, run_info(config, [], tokenizer, code_version(), mesh), CheckpointMetadata()
        )
        write_config(workdir, config, corpora=[])
    num_parameters = sum(tensor.size for tensor in tensors)
    if tokenizer and tokenizer.definition is not None and not eod_token:
        parsed = parse_tokenizer(tokenizer.definition, tokenizer.name)
        notes += find_markers(tokenizer.name, parsed).disagreements
    return ConversionSummary(num_parameters, 4 * num_parameters, notes=notes)


class _SourceModel(NamedTuple):
    """A model in the Hugging Face format that has passed all checks, except of its numbers.

    Attributes:
        config: The configuration of the run that it becomes.
        shapes: The shapes of our parameters, by their paths.
        files: The file of each tensor, by the tensor's name.
        tokenizer: Its tokenizer, if it has one.
        generation: The content of its `generation_config.json`, with all ids of special tokens.
        notes: Notes for the user, one line each.
    """

    config: RunConfig
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, safe_open]
    tokenizer: Tokenizer | None
    generation: dict[str, Any]
    notes: tuple[str, ...]


def _check_source(source: str, eod_token: str | None) -> _SourceModel:
    """Opens and checks a model in the Hugging Face format; arguments as for `import_model`."""
    path = inner_path(source, _CONFIG_FILE)
    hf_config = read_json(path)
    files = open_tensors(source)
    try:
        model, backend = from_hf_config(hf_config, count_elements(files))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    notes = describe_ignored_fields(hf_config)
    shapes = parameter_shapes(model)
    try:
        check_tensors(source, hf_tensors(shapes), files)
    except ValueError as error:
        raise ValueError("; ".join([str(error), *notes])) from error
    generation = _token_ids(hf_config) | _read_generation_config(source)
    eos_ids(source, generation, model.vocab_size)  # Fails now rather than when the run is used.
    tokenizer = find_tokenizer(source, eod_token)
    if eod_token and not tokenizer:
        raise ValueError(
            f"eod_token={eod_token!r} needs a tokenizer, but {source} has no {TOKENIZER_FILE}"
        )
    if tokenizer and tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} ids, but the model has only"
            f" {model.vocab_size}"
        )
    # The run has no data to hold out for validation.
    config = RunConfig(model=model, backend=backend, data=DataConfig(validation_fraction=0.0))
    return _SourceModel(config, shapes, files, tokenizer, generation, notes)


def export_model(
    config: RunConfig,
    workdir: Workdir,
    step: int,
    target: str,
    report: Callable[[int, int], None],
    *,
    dtype: str,
    max_shard_bytes: int,
    refuse_nonfinite: bool = False,
) -> ConversionSummary:
    """Exports a checkpoint, or the moving average of its parameters, in the Hugging Face format.

    Args:
        config: The run's configuration.
        workdir: The run's folder.
        step: The checkpoint's step.
        target: The folder to create.
        report: Called with the number of parameters written so far, and of all parameters.
        dtype: Type of the tensors, `float32` or `bfloat16`.
        max_shard_bytes: See `write_tensors`.
        refuse_nonfinite: See `import_model`.

    Returns:
        A summary of what was written.

    Raises:
        ValueError: If the Hugging Face format does not support the model, the tokenizer cannot be
            used, a parameter is rejected, or the target exists.
        CheckpointGone: If the checkpoint has been removed meanwhile.
        OSError: If a file cannot be read or written.
    """
    hf_config = to_hf_config(config.model, config.backend, dtype)
    tokenizer = read_tokenizer(workdir, read_run_info(workdir.checkpoints, step))
    generation = _read_generation_config(workdir.path) or _marker_ids(tokenizer)
    shapes = parameter_shapes(config.model)
    tensors = hf_tensors(shapes)
    with new_folder(target) as folder, reading_checkpoint(workdir.checkpoints, step):
        arrays = open_params(workdir.checkpoints, step, shapes)
        reader = _TensorReader(functools.partial(_read_slice, arrays), tensors, report)
        num_files = write_tensors(
            folder, tensors, reader.read, dtype=dtype, max_shard_bytes=max_shard_bytes
        )
        notes = reader.check(workdir.path, refuse_nonfinite)
        write_json(os.path.join(folder, _CONFIG_FILE), hf_config | _token_ids(generation))
        write_json(os.path.join(folder, _GENERATION_FILE), generation)
        copy_files(workdir.path, folder, TOKENIZER_FILES)
        if isinstance(tokenizer, ByteTokenizer):
            write_byte_tokenizer_files(folder)
    num_parameters = sum(tensor.size for tensor in tensors)
    num_bytes = num_parameters * (2 if dtype == "bfloat16" else 4)
    return ConversionSummary(num_parameters, num_bytes, num_files, notes)


def _read_generation_config(folder: str) -> dict[str, Any]:
    path = find_file(folder, _GENERATION_FILE)
    return read_json(path) if path else {}


def _token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ids of special tokens that a configuration has."""
    return {name: config[name] for name in _TOKEN_IDS if name in config}


def _marker_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Returns the ids of a tokenizer's special tokens; the end-of-document token also pads."""
    if tokenizer is None:
        return dict.fromkeys(_TOKEN_IDS)
    return dict(
        zip(_TOKEN_IDS, (tokenizer.bos_id, tokenizer.eod_id, tokenizer.eod_id), strict=True)
    )


class _TensorReader:
    """Reads tensors, reports the progress, and counts elements that are infinite or NaN."""

    def __init__(
        self,
        read: Callable[[HFTensor], np.ndarray],
        tensors: Sequence[HFTensor],
        report: Callable[[int, int], None],
    ):
        """Takes the function that reads a tensor, all tensors, and the progress callback."""
        self._read, self._report = read, report
        self._done, self._total = 0, sum(tensor.size for tensor in tensors)
        self._nonfinite: dict[str, int] = {}

    def read(self, tensor: HFTensor) -> np.ndarray:
        """Reads a tensor."""
        array = self._read(tensor)
        count = array.size - int(np.count_nonzero(np.isfinite(array)))
        if count:
            self._nonfinite[tensor.name] = count
        self._done += tensor.size
        self._report(self._done, self._total)
        return array

    def check(self, source: str, refuse: bool) -> tuple[str, ...]:
        """Returns a note if tensors had infinite or NaN elements; raises ValueError if `refuse`."""
        if not self._nonfinite:
            return ()
        text = nonfinite_text(self._nonfinite)
        if refuse:
            raise ValueError(f"{source}: {text}")
        return (text,)


def _read_tensor(files: Mapping[str, safe_open], tensor: HFTensor) -> np.ndarray:
    """Reads a tensor of the Hugging Face format as our parameter, float32."""
    array = files[tensor.name].get_tensor(tensor.name).astype(np.float32, copy=False)
    return array.T if tensor.is_transposed else array


def _array_parts(
    read: Callable[[HFTensor], np.ndarray], shape: tuple[int, ...], tensors: Sequence[HFTensor]
) -> StreamedArray:
    """Returns a parameter that is assembled from one tensor, or from one per block."""

    def parts() -> Iterator[np.ndarray]:
        for tensor in tensors:
            array = read(tensor)
            yield array if tensor.block is None else array[None]

    return StreamedArray(shape, len(tensors), parts())


def _read_slice(arrays: Mapping[str, tensorstore.TensorStore], tensor: HFTensor) -> np.ndarray:
    """Reads a tensor of the Hugging Face format from our parameters, float32."""
    array = arrays[tensor.parameter]
    array = array if tensor.block is None else array[tensor.block]
    array = array.T if tensor.is_transposed else array
    with as_os_error(f"the parameter {tensor.parameter} cannot be read"):
        return array.read(order="C").result()
