"""Recognizes errors of the mLSTM's kernels, and says how to do without them.

Kernels are traced, lowered and compiled with the program that they are a part of. So their errors
come out of any call of a compiled function, and name neither the mLSTM nor its sizes.
"""

import traceback

_LONGEST_REASON = 300  # Characters; a compiler may report a page.
_notes: dict[str, str] = {}


def note_heads(qk_dim: int, v_dim: int, dtype: str) -> None:
    """Notes the heads that kernels are about to be traced for; the last ones count.

    Args:
        qk_dim: `DHQK`.
        v_dim: `DHV`.
        dtype: Name of the type of `q`, `k` and `v`.
    """
    _notes["heads"] = f", for heads of DHQK={qk_dim}, DHV={v_dim} in {dtype},"


def kernel_problem(error: BaseException) -> str:
    """Returns a message about an error of the kernels.

    Args:
        error: Any error.

    Returns:
        A sentence with the heads, the reason, and the field that avoids the kernels; "" if the
        error is another one.
    """
    text = " ".join(str(error).split())
    # The compiler and the card report without a trace of the kernel in Python.
    is_reported = isinstance(error, RuntimeError) and "Mosaic GPU" in text
    if not is_reported and not _is_raised_in_kernel(error):
        return ""
    if len(text) > _LONGEST_REASON:
        text = f"{text[:_LONGEST_REASON]} ..."
    return (
        f"a kernel of the mLSTM{_notes.get('heads', '')} does not compile or run"
        f" ({type(error).__name__}: {text}); set backend.implementation=xla, for a saved run in its"
        " config.json"
    )


def _is_raised_in_kernel(error: BaseException) -> bool:
    """Returns whether an error was raised while a kernel was traced or lowered."""
    frames = traceback.walk_tb(error.__traceback__)
    modules = (frame.f_globals.get("__name__", "") for frame, _ in frames)
    return any(name.startswith("jax.") and "mosaic" in name for name in modules)
