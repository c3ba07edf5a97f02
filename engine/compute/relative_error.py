"""How far a kernel's result is from what it should be: of small products that it is tried with."""

from torch import Tensor

WRONG = 1e6  # of what is no numbers, or of another shape


def relative_error(out: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of `expected`, which is in fp32; WRONG at the most."""
    if out.shape != expected.shape:
        return WRONG
    error = ((out.float() - expected).norm() / expected.norm()).item()
    return min(error, WRONG) if error == error else WRONG
