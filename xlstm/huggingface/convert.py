"""Models of the public layout made folders of runs, and back; a few tensors are in memory at once.

Everything that can be checked is checked before anything is written, and the folder that is written
has its name only when it is whole.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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
    demands_without_effect,
    from_hf_config,
    hf_tensors,
    parameter_shapes,
    to_hf_config,
)
from xlstm.huggingface.safetensors_files import (
    check_tensors,
    count_numbers,
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
class Converted:
    """What a conversion wrote.

    Attributes:
        num_parameters: The number of parameters.
        num_bytes: The bytes that they take.
        num_files: The number of files that hold them; None for a checkpoint of ours.
        notes: What the user should know, a line each.
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
) -> Converted:
    """Makes the folder of a run, with one checkpoint, of a model of the public layout.

    The checkpoint holds the parameters alone, float32. Beside it lie the model's tokenizer, if it
    has one, and its `generation_config.json`.

    Args:
        source: The model's folder.
        target: The folder to make.
        report: Is told how many of how many parameters are written.
        eod_token: The token that ends its documents; None for what its files name.
        refuse_nonfinite: Whether numbers that are infinite or NaN are an error, and not a note.

    Returns:
        What was written.

    Raises:
        ValueError: If the model, its files or its tokenizer cannot be used, a number is refused,
            or there is something of the target's name.
        OSError: If something cannot be read or written.
    """
    check_storage_path(target)
    path = inner_path(source, _CONFIG_FILE)
    published = read_json(path)
    files = open_tensors(source)
    try:
        model, backend = from_hf_config(published, count_numbers(files))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    notes = demands_without_effect(published)
    shapes = parameter_shapes(model)
    tensors = hf_tensors(shapes)
    try:
        check_tensors(source, tensors, files)
    except ValueError as error:
        raise ValueError("; ".join([str(error), *notes])) from error
    generation = _token_ids(published) | _read_generation_config(source)
    eos_ids(source, generation, model.vocab_size)  # So that the run can be used.
    tokenizer = find_tokenizer(source, eod_token)
    if eod_token and not tokenizer:
        raise ValueError(f"{source} has no {TOKENIZER_FILE} that {eod_token!r} could be a token of")
    if tokenizer and tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the model only"
            f" {model.vocab_size}"
        )
    # There is no data to hold something out of.
    config = RunConfig(model=model, backend=backend, data=DataConfig(validation_fraction=0.0))
    with new_folder(target) as folder:
        workdir = Workdir(folder)
        copy_files(source, folder, TOKENIZER_FILES)
        write_json(os.path.join(folder, _GENERATION_FILE), generation)
        counted = _Counted(functools.partial(_read_tensor, files), tensors, report)
        parts = {
            f"params.{name}": _parts(
                counted.read, shape, [x for x in tensors if x.parameter == name]
            )
            for name, shape in shapes.items()
        }
        checkpoints = CheckpointFolder(workdir.checkpoints)
        checkpoints.begin(0)
        with as_os_error(f"the parameters cannot be written to {target}"):
            write_streamed_arrays(os.path.join(checkpoints.unfinished_dir(0), STATE_DIR), parts)
        notes += counted.check(source, refuse_nonfinite)
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
    return Converted(num_parameters, 4 * num_parameters, notes=notes)


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
) -> Converted:
    """Writes a checkpoint in the public layout: its parameters or, if it has one, their average.

    Args:
        config: The run's configuration.
        workdir: The run's folder.
        step: The checkpoint's step.
        target: The folder to make.
        report: Is told how many of how many parameters are written.
        dtype: Type of the tensors, `float32` or `bfloat16`.
        max_shard_bytes: See `write_tensors`.
        refuse_nonfinite: See `import_model`.

    Returns:
        What was written.

    Raises:
        ValueError: If the public layout has no such model, the tokenizer cannot be used, a number
            is refused, or there is something of the target's name.
        CheckpointGone: If the checkpoint has been removed meanwhile.
        OSError: If something cannot be read or written.
    """
    published = to_hf_config(config.model, config.backend, dtype)
    tokenizer = read_tokenizer(workdir, read_run_info(workdir.checkpoints, step))
    generation = _read_generation_config(workdir.path) or _marker_ids(tokenizer)
    shapes = parameter_shapes(config.model)
    tensors = hf_tensors(shapes)
    with new_folder(target) as folder, reading_checkpoint(workdir.checkpoints, step):
        arrays = open_params(workdir.checkpoints, step, shapes)
        counted = _Counted(functools.partial(_read_slice, arrays), tensors, report)
        num_files = write_tensors(
            folder, tensors, counted.read, dtype=dtype, max_shard_bytes=max_shard_bytes
        )
        notes = counted.check(workdir.path, refuse_nonfinite)
        write_json(os.path.join(folder, _CONFIG_FILE), published | _token_ids(generation))
        write_json(os.path.join(folder, _GENERATION_FILE), generation)
        copy_files(workdir.path, folder, TOKENIZER_FILES)
        if isinstance(tokenizer, ByteTokenizer):
            write_byte_tokenizer_files(folder)
    num_parameters = sum(tensor.size for tensor in tensors)
    num_bytes = num_parameters * (2 if dtype == "bfloat16" else 4)
    return Converted(num_parameters, num_bytes, num_files, notes)


def _read_generation_config(folder: str) -> dict[str, Any]:
    path = find_file(folder, _GENERATION_FILE)
    return read_json(path) if path else {}


def _token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the ids of special tokens that a configuration has."""
    return {name: config[name] for name in _TOKEN_IDS if name in config}


def _marker_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Ids of the markers; the one behind documents pads, too."""
    if tokenizer is None:
        return dict.fromkeys(_TOKEN_IDS)
    return dict(
        zip(_TOKEN_IDS, (tokenizer.bos_id, tokenizer.eod_id, tokenizer.eod_id), strict=True)
    )


class _Counted:
    """Reads tensors, and counts their numbers and those that are not finite."""

    def __init__(
        self,
        read: Callable[[HFTensor], np.ndarray],
        tensors: Sequence[HFTensor],
        report: Callable[[int, int], None],
    ):
        """Takes what reads, the tensors, and what is told how many numbers of all are read."""
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
        """Says what was found in all that was read; raises ValueError if it is to be refused."""
        if not self._nonfinite:
            return ()
        text = nonfinite_text(self._nonfinite)
        if refuse:
            raise ValueError(f"{source}: {text}")
        return (text,)


def _read_tensor(files: Mapping[str, safe_open], tensor: HFTensor) -> np.ndarray:
    """One tensor of the public layout as ours is, float32."""
    array = files[tensor.name].get_tensor(tensor.name).astype(np.float32, copy=False)
    return array.T if tensor.is_transposed else array


def _parts(
    read: Callable[[HFTensor], np.ndarray], shape: tuple[int, ...], tensors: Sequence[HFTensor]
) -> StreamedArray:
    """A parameter of ours, made of one tensor or of one for each block."""

    def parts() -> Iterator[np.ndarray]:
        for tensor in tensors:
            array = read(tensor)
            yield array if tensor.block is None else array[None]

    return StreamedArray(shape, len(tensors), parts())


def _read_slice(arrays: Mapping[str, tensorstore.TensorStore], tensor: HFTensor) -> np.ndarray:
    """One tensor of the public layout, from our parameters; float32."""
    array = arrays[tensor.parameter]
    array = array if tensor.block is None else array[tensor.block]
    array = array.T if tensor.is_transposed else array
    with as_os_error(f"the parameter {tensor.parameter} cannot be read"):
        return array.read(order="C").result()
