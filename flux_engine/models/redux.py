"""FLUX.1 Redux's adapter: what SigLIP sees in a picture, as tokens that FLUX reads like a prompt.

Names are those of the published checkpoint. Source: black-forest-labs/flux, src/flux/modules/image_embedders.py.
Shapes: B batch, L tokens, D width of the text.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from flux_engine.params import ReduxParams


class ReduxAdapter(nn.Module):
    def __init__(self, params: ReduxParams) -> None:
        super().__init__()
        self.params = params
        self.redux_up = nn.Linear(params.in_dim, 3 * params.text_dim)
        self.redux_down = nn.Linear(3 * params.text_dim, params.text_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, in_dim) -> (B, L, D)."""
        return self.redux_down(F.silu(self.redux_up(x)))
