"""Does the engine compute from the exported file what PyTorch computed in training?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitnet_py import Model
from tools.train import suite
from tools.train.model import BitNet
from tools.train.shape import Shape

MIN_COSINE = 0.995
"""A trained network gave 0.998 at its worst position: sums in another order flip a few int8 codes."""
MAX_MARGIN = 0.5
"""In logits: where the top tokens differ, PyTorch's must be this near to a tie."""


@dataclass(frozen=True)
class Agreement:
    """Logits of the engine against PyTorch's, over every position of prompts and answers."""

    n_positions: int
    min_cosine: float
    same: float
    """Fraction of positions with the same top token."""
    widest_margin: float
    """Where the top tokens differ: the largest lead, in PyTorch's logits, over the engine's choice."""

    @property
    def agrees(self) -> bool:
        """Return whether the file is the trained network up to rounding."""
        return self.n_positions > 0 and self.min_cosine > MIN_COSINE and self.widest_margin < MAX_MARGIN

    def __str__(self) -> str:
        return (
            f"engine against PyTorch on {self.n_positions} positions: min cosine {self.min_cosine:.6f}, "
            f"same top token {self.same:.3%}, widest margin where not {self.widest_margin:.3f}"
        )


@torch.no_grad()
def compare(weights: Mapping[str, Any], shape: Shape, path: Path) -> Agreement:
    """Feed the long suite's questions and answers to both and compare the logits of every position."""
    net = BitNet(shape)
    net.load_state_dict(weights)
    cosines: list[float] = []
    margins: list[float] = []
    with Model.from_gguf(path) as model:
        for line in suite.read("long-500"):
            ids = model.tokenizer.encode(f"{line['prompt']} {line['answer']}")
            logits = model.forward(ids, model.new_cache(), logits="all").logits
            if logits is None:
                raise RuntimeError("the engine returned no logits")
            ours = torch.from_numpy(logits.copy())
            mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
            theirs = net(torch.tensor([ids]), mask[None, None])[0]
            cosines += torch.cosine_similarity(ours, theirs, dim=-1).tolist()
            best = theirs.max(dim=-1).values
            margins += (best - theirs.gather(1, ours.argmax(dim=-1, keepdim=True))[:, 0]).tolist()
    same = sum(margin == 0 for margin in margins) / len(margins)
    return Agreement(len(margins), min(cosines), same, max(margins))
