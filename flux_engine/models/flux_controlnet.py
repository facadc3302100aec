"""ControlNets for FLUX.1: a shorter transformer that reads a hint beside the latent, and steers the whole one.

After each of its blocks a linear (`controlnet_blocks`, `controlnet_single_blocks`) gives a sample, (B, Li, D), which is
added to the image tokens of the base network after one block or several. The hint is latent tokens of the control
picture, or, in XLabs' networks, the picture itself through a few convolutions. A union network is told what kind of
hint it is by one more token, before the text. Attribute names are those of Black Forest Labs' checkpoints and, for what
they lack, of diffusers' FluxControlNetModel; XLabs' source is XLabs-AI/x-flux, src/flux/controlnet.py.

What depends neither on the latent nor on the hint is made once by `precompute`, as for the base; the hint is embedded
once by `embed_hint`.

Shapes: B batch, S calls, L tokens (Li image, Lt text), D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flux_engine.models.flux import FluxTrunk, TrunkStatics, patchify
from flux_engine.models.layers import Residuals
from flux_engine.params import FluxControlNetParams, FluxParams

FluxControlNetStatics = TrunkStatics


def hint_block(width: int, out_channels: int) -> nn.Sequential:
    """A picture (B, 3, 8 h, 8 w) -> (B, out_channels, h, w)."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.SiLU()]
    for _ in range(3):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1, stride=2), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, out_channels, 3, padding=1))


class FluxControlNet(FluxTrunk):
    """A ControlNet for FLUX.1: gives what is added to the transformer's image tokens."""

    def __init__(self, params: FluxControlNetParams) -> None:
        super().__init__(params)
        self.params = params
        dim = params.hidden_size
        if params.hint_width:
            self.input_hint_block = hint_block(params.hint_width, params.hint_channels // 4)
        self.controlnet_x_embedder = nn.Linear(params.hint_channels, dim)
        if params.num_modes:
            self.controlnet_mode_embedder = nn.Embedding(params.num_modes, dim)
        self.controlnet_blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(params.depth))
        self.controlnet_single_blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(params.depth_single_blocks))

    @property
    def reads_picture(self) -> bool:
        """The hint is the control picture itself, not its latent."""
        return self.params.hint_width > 0

    def embed_hint(self, hint: Tensor) -> Tensor:
        """The hint as `forward` takes it, (B, Li, D): the same for all calls.

        hint: latent tokens (B, Li, hint_channels), or where `reads_picture` says so the picture (B, 3, 16 h, 16 w) in
        [-1, 1].
        """
        hint = hint.to(self.dtype)
        if self.reads_picture:
            # One by one, as pictures are decoded: a convolution's rounding depends on the batch.
            hint = torch.cat([patchify(self.input_hint_block(picture)) for picture in hint.split(1)])
        return self.controlnet_x_embedder(hint)

    def precompute(
        self,
        context: Tensor,
        pooled: Tensor,
        img_ids: Tensor,
        timesteps: Tensor,
        guidance: Tensor | None,
        mode: int | None = None,
    ) -> FluxControlNetStatics:
        """Everything that depends neither on the latent nor on the hint, for all calls at once.

        As `Flux.precompute`. `mode` tells a union network what kind of hint it gets; for any other it is None.
        """
        modes = self.params.num_modes
        if (mode is None) if modes else (mode is not None):
            raise ValueError(f"mode is {mode} for a network of {modes} modes")
        txt = self.txt_in(context.to(self.dtype))
        if mode is not None:
            if not 0 <= mode < modes:
                raise ValueError(f"there is no mode {mode}: the network has {modes}")
            token = self.controlnet_mode_embedder.weight[mode]
            txt = torch.cat((token.expand(len(txt), 1, -1), txt), dim=1)
        return self.prepare(txt, img_ids, self.condition(pooled, timesteps, guidance))

    def forward(self, x: Tensor, hint: Tensor, call: int, statics: FluxControlNetStatics) -> tuple[Tensor, ...]:
        """A sample (B, Li, D) for each block, the double ones first, at call number `call`.

        x (B, Li, in_channels), hint (B, Li, D) as `embed_hint` gave it. What the samples are to the base network,
        `residuals` says.
        """
        return self.call_step(self.samples, x, hint, statics.at(call))

    def samples(self, x: Tensor, hint: Tensor, statics: FluxControlNetStatics) -> tuple[Tensor, ...]:
        """`forward` with what one call reads of the statics."""
        img, txt = self.img_in(x.to(self.dtype)) + hint, statics.txt
        cos, sin = statics.cos, statics.sin
        samples: list[Tensor] = []
        doubles = zip(self.double_blocks, self.controlnet_blocks, statics.double, strict=True)
        for block, out, (img_mod, txt_mod) in doubles:
            img, txt = self.call_block(block, img, txt, img_mod, txt_mod, cos, sin)
            samples.append(out(img))
        joined = torch.cat((txt, img), dim=1)  # (B, Lt + Li, D)
        singles = zip(self.single_blocks, self.controlnet_single_blocks, statics.single, strict=True)
        for block, out, mod in singles:
            joined = self.call_block(block, joined, mod, cos, sin)
            # Contiguous, because torch multiplies a strided batch by another path.
            samples.append(out(joined[:, txt.shape[1] :].contiguous()))
        return tuple(samples)

    def residuals(self, samples: Sequence[Tensor], base: FluxParams) -> Residuals:
        """What `forward` gave, as `Flux.forward` takes it."""
        depth = self.params.depth
        return spread(samples[:depth], samples[depth:], base.depth, base.depth_single_blocks, repeat=self.reads_picture)


def spread(
    double: Sequence[Tensor], single: Sequence[Tensor], depth: int, depth_single: int, *, repeat: bool = False
) -> Residuals:
    """Samples of a ControlNet -> one slot for each of a network's `depth` double and `depth_single` single blocks.

    n samples serve as many blocks one after another, block i taking sample i // ceil(depth / n): so the last samples
    may be left over, and are where there are more of them than blocks. With `repeat`, XLabs' way, double blocks take
    sample i % n. This is how diffusers' FluxTransformer2DModel adds them.
    """
    doubles = (double[i % len(double)] for i in range(depth)) if repeat and double else _in_turn(double, depth)
    return (*doubles, *_in_turn(single, depth_single))


def _in_turn(samples: Sequence[Tensor], depth: int) -> Residuals:
    if not samples:
        return (None,) * depth
    each = -(-depth // len(samples))
    return tuple(samples[i // each] for i in range(depth))
