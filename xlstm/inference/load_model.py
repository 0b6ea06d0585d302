"""Loads the model of a run from Python, on any devices.

    from xlstm.inference.load_model import load_run

    run = load_run("runs/smoke")
    logits = run.logits("def main(")  # (T, V)
    print(run.generate("def main(", max_tokens=50))

`run.params`, `run.config` and `run.tokenizer` are what the functions of `xlstm.inference.decode`
and `xlstm.inference.generate` take, for batches of prompts and decoding loops of your own.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from xlstm.dataset.tokenizer import Tokenizer
from xlstm.distributed.mesh import MESH_AXES, create_mesh
from xlstm.inference.decode import compute_logits, rows_spec
from xlstm.inference.generate import (
    GenerationConfig,
    check_prompts,
    encode_prompt,
    generate_text,
)
from xlstm.inference.loaded_model import LoadedModel, reshard_for_inference
from xlstm.inference.sampling import SamplingConfig
from xlstm.trainer.checkpoints.read_params import read_fingerprint, read_params, read_run_info
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import check_model
from xlstm.trainer.llm.find_checkpoint import read_checkpoint
from xlstm.trainer.llm.language_model import abstract_params
from xlstm.trainer.llm.run_tokenizer import read_eos_ids, read_tokenizer
from xlstm.trainer.llm.workdir import Workdir, load_run_config

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedRun(LoadedModel):
    """The model of a run's checkpoint, on devices; see `LoadedModel`.

    Attributes:
        workdir: The run's folder.
        step: The checkpoint's step.
        run_config: The run's configuration, with the mesh that the model is loaded on.
    """

    workdir: Workdir
    step: int
    run_config: RunConfig

    def logits(self, prompt: str | ArrayLike) -> jax.Array:
        """Computes the logits of the token that follows each token of a prompt.

        Compiles a program for each shape.

        Args:
            prompt: A text, which starts a document, or ids `(T,)` or `(B, T)`.

        Returns:
            Logits, float32 `(T, V)`, or `(B, T, V)` for a batch.

        Raises:
            ValueError: If the prompt is empty, or has an id or a character that is not in the
                vocabulary.
        """
        tokens = np.asarray(self._encode(prompt) if isinstance(prompt, str) else prompt)
        rows = np.atleast_2d(tokens)
        check_prompts(self, rows.tolist())
        rows = jax.device_put(rows, NamedSharding(self.mesh, rows_spec(len(rows), self.mesh)))
        logits = compute_logits(self.params, rows, config=self.config)
        return logits if tokens.ndim == 2 else logits[0]

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 200,
        *,
        stop_strings: Sequence[str] = (),
        seed: int = 0,
        **sampling: float,
    ) -> str:
        """Generates the text that follows a prompt; see `generate_text` for batches and ids.

        Args:
            prompt: A text, which starts a document, or ids.
            max_tokens: The largest number of tokens to generate.
            stop_strings: Strings that end the text and are not part of it.
            seed: Random seed.
            **sampling: Fields of `SamplingConfig`, such as `temperature=0`.

        Returns:
            The text, without the prompt.

        Raises:
            ValueError: If the model has no tokenizer, the prompt has an id or a character that is
                not in the vocabulary, or an option is invalid.
        """
        ids = self._encode(prompt) if isinstance(prompt, str) else prompt
        defaults = {"vocab_size": self._require_tokenizer().vocab_size}
        sampling_config = SamplingConfig(**defaults | sampling)
        config = GenerationConfig(max_tokens, sampling_config, tuple(stop_strings), seed)
        (completion,), _ = generate_text(self, [ids], config)
        return completion.text

    def _encode(self, text: str) -> list[int]:
        self._require_tokenizer()
        return encode_prompt(self, text)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"the model in {self.workdir.path} has no tokenizer: use token ids")
        return self.tokenizer


def load_run(
    folder: str,
    *,
    mesh: Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> LoadedRun:
    """Loads the model of a run: the moving average of its parameters, if it keeps one.

    The mesh that wrote the checkpoint does not matter. The run may be training meanwhile.

    Args:
        folder: The folder of a run, for its last confirmed checkpoint, or of one of its
            checkpoints.
        mesh: Sizes of mesh axes, such as `{"tp": 8}`; the others are 1, except for `dp`, which
            takes the remaining devices. None for `dp` alone: each device has all parameters.
        devices: The devices of the mesh; None for all.
        report: Called with a line if the newest checkpoint is not confirmed, and so is not used.

    Returns:
        The model.

    Raises:
        ValueError: If the folder does not exist or has no checkpoint, the model does not fit on the
            mesh, or its tokenizer is missing or differs.
        OSError: If the checkpoint cannot be read.
    """

    def load(config: RunConfig, workdir: Workdir, step: int) -> LoadedRun:
        device_mesh = create_mesh(config.mesh, devices)
        check_model(config.model, device_mesh)
        tokenizer = read_tokenizer(workdir, read_run_info(workdir.checkpoints, step))
        eos_ids = read_eos_ids(workdir, config.model.vocab_size)
        like, _ = abstract_params(config, device_mesh)
        params = read_params(workdir.checkpoints, step, like)
        return LoadedRun(
            config=config.language_model,
            params=reshard_for_inference(params, device_mesh),
            mesh=device_mesh,
            tokenizer=tokenizer,
            fingerprint=read_fingerprint(workdir.checkpoints, step),
            eos_ids=eos_ids,
            workdir=workdir,
            step=step,
            run_config=config,
        )

    return read_run(folder, load, mesh=mesh, report=report)


def read_run(
    folder: str,
    read: Callable[[RunConfig, Workdir, int], _Result],
    *,
    mesh: Mapping[str, int] | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> _Result:
    """Reads a checkpoint of a run that may be training meanwhile; see `read_checkpoint`.

    Args:
        folder: See `load_run`.
        read: Reads the checkpoint, given the run's configuration with the mesh to use, the run's
            folder and the step.
        mesh: See `load_run`.
        report: See `load_run`.

    Returns:
        What `read` returned.

    Raises:
        ValueError: If the folder does not exist or has no checkpoint, or `mesh` has an unknown
            axis.
        OSError: If the checkpoint cannot be read.
    """
    sizes = dict.fromkeys(MESH_AXES, 1) | {"dp": -1} | dict(mesh or {})
    unknown = sizes.keys() - set(MESH_AXES)
    if unknown:
        raise ValueError(
            f"mesh has the axis {min(unknown)!r}: expected axes among {', '.join(MESH_AXES)}"
        )

    def read_configured(workdir: Workdir, step: int) -> _Result:
        config = load_run_config(workdir)
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
        return read(config, workdir, step)

    return read_checkpoint(folder, read_configured, report)
