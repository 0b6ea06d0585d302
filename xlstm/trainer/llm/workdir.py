"""The folder that a run owns."""

import dataclasses
import json
import os
from typing import Any

from xlstm.trainer.base.files import write_atomically
from xlstm.trainer.llm.config import RunConfig

# What may differ when a run goes on: sections, or fields as `section.field`.
_FREE_TO_CHANGE = {
    "mesh",
    "logger",
    "trainer.num_steps",
    "trainer.num_minibatches",
    "trainer.eval_interval",
    "trainer.eval_batches",
    "trainer.checkpoint_interval",
    "trainer.max_checkpoints",
}


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Where everything of a run lies."""

    path: str

    @property
    def config(self) -> str:
        """The resolved configuration."""
        return os.path.join(self.path, "config.json")

    @property
    def metrics(self) -> str:
        """The metrics, one JSON object a line."""
        return os.path.join(self.path, "metrics.jsonl")

    @property
    def loss_plot(self) -> str:
        """The loss curves."""
        return os.path.join(self.path, "loss.png")

    @property
    def tensorboard(self) -> str:
        """The folder of the TensorBoard event files."""
        return os.path.join(self.path, "tensorboard")

    @property
    def checkpoints(self) -> str:
        """The folder of the checkpoints."""
        return os.path.join(self.path, "checkpoints")

    @property
    def stdlib_store(self) -> str:
        """The token store of the built-in corpus."""
        return os.path.join(self.path, "stdlib")


def _flatten(config: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{field}": value
        for section, fields in config.items()
        for field, value in fields.items()
    }


def claim_workdir(
    workdir: Workdir,
    config: RunConfig,
    corpora: list[str],
    *,
    allow_config_change: bool = False,
    write: bool = True,
) -> None:
    """Checks the configuration in a run's folder, if there is one, and writes this one there.

    Args:
        workdir: The folder of the run; made if it is not there.
        config: The run's configuration.
        corpora: Checksums of what it trains on.
        allow_config_change: Whether to go on when the configuration there is another.
        write: Whether to write; of several processes one does, all check.

    Raises:
        ValueError: If the folder belongs to a run whose configuration or corpus differs in more
            than what may differ (`_FREE_TO_CHANGE`), or holds something else.
    """
    resolved = json.loads(json.dumps(dataclasses.asdict(config)))  # Tuples become lists.
    if os.path.exists(workdir.config):
        with open(workdir.config, encoding="utf-8") as file:
            try:
                saved = json.load(file)
                before, now = _flatten(saved["config"]), _flatten(resolved)
                saved_corpora = saved["corpora"]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{workdir.config} is not a configuration of ours") from None
        differences = [
            f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
            and not {name, name.split(".")[0]} & _FREE_TO_CHANGE
        ]
        if saved_corpora != corpora:
            differences.append("the token stores hold other text")
        if differences and not allow_config_change:
            raise ValueError(
                f"{workdir.path} belongs to a run with another configuration"
                f" ({'; '.join(differences)}): choose another --workdir,"
                " or go on with --allow_config_change"
            )
    elif os.path.exists(workdir.checkpoints) or os.path.exists(workdir.metrics):
        raise ValueError(
            f"{workdir.path} holds a run without its config.json: choose another --workdir"
        )
    if not write:
        return
    os.makedirs(workdir.path, exist_ok=True)
    content = {"config": resolved, "corpora": corpora}
    write_atomically(workdir.config, json.dumps(content, indent=2) + "\n")
