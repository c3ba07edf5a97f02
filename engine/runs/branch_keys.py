"""What tells the branches of an evaluation from each other, the same in every step. Holds nothing of them."""

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class BranchKey:
    """image: which of the batch the branch is computed for; its answers to several prompts make one guided step. which:
    tells those of an image from each other."""

    image: Hashable
    which: Hashable
