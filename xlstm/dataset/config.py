"""The settings of the input pipeline."""

import dataclasses

STDLIB = "stdlib"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads, and in which pieces.

    Raises:
        ValueError: A field has a value that cannot work.
    """

    stores: tuple[str, ...] = (STDLIB,)  # Token stores (folders); "stdlib": Python's own library.
    weights: tuple[float, ...] = ()  # Share of each store in training; empty: by its tokens.
    context_length: int = 256  # Tokens in a row of a batch.
    batch_size: int = 16  # Rows in a batch, over all processes.
    validation_fraction: float = 0.02  # Share of the documents kept for validation; 0: none.
    seed: int = 0  # Order of the training rows; the validation split does not depend on it.

    def __post_init__(self):
        """Checks every field."""
        if not self.stores:
            raise ValueError("data.stores is empty: name at least one token store")
        if self.context_length < 1 or self.batch_size < 1:
            raise ValueError(
                "data.context_length and data.batch_size must be at least 1, not "
                f"{self.context_length} and {self.batch_size}"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction must be in [0, 1), not {self.validation_fraction}"
            )
        if self.seed < 0:
            raise ValueError(f"data.seed must not be negative, but is {self.seed}")
        self._check_weights()

    def _check_weights(self):
        if not self.weights:
            return
        if len(self.weights) != len(self.stores):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.stores)} stores: give "
                "one for each, or none"
            )
        if not all(0 <= weight < float("inf") for weight in self.weights) or not any(self.weights):
            raise ValueError(
                f"data.weights must be finite, not negative, and not all 0, not {self.weights}"
            )
