"""The FLUX.1 transformer: double-stream blocks, single-stream blocks, flow-matching velocity out.

Attribute names are those of Black Forest Labs' checkpoints (fused qkv, linear1), so a published file loads without
a key map. Source of the architecture: black-forest-labs/flux, src/flux/model.py and modules/layers.py.

What differs from the reference: everything that depends on the prompt and the schedule but not on the latent
(rotary tables, the embedded text, every block's modulation for every call) is made once by `precompute`. Modulation
holds 27 % of FLUX's weights and is a product with one row per step, so it is computed here as one product with a row
for each call. `forward` then touches only the tokens, and has nothing that waits for the device.

Shapes: B batch, S calls, L tokens (Li image, Lt text), H heads, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from flux_engine import ops
from flux_engine.attention import attention
from flux_engine.linears import Rows, linear, linear_and_gelu, modulated
from flux_engine.models.layers import BatchRows, Residuals, Stepwise, merge_heads
from flux_engine.params import FluxParams, FluxTrunkParams


@dataclass(frozen=True)
class TrunkStatics:
    """What `precompute` makes for one prompt batch and one schedule; frozen for the whole request."""

    txt: Tensor
    """Embedded text tokens (B, Lt, D)."""
    cos: Tensor
    sin: Tensor
    """Rotary tables (Lt + Li, head_dim / 2), float32."""
    double: tuple[tuple[Tensor, Tensor], ...]
    """Per double block the modulation of the image and of the text stream, each (S, B, 6, 1, D):
    shift, scale, gate for attention, then for the MLP."""
    single: tuple[Tensor, ...]
    """Per single block (S, B, 3, 1, D): shift, scale, gate."""

    @classmethod
    def cat(cls, rows: Sequence[Self]) -> Self:
        """One batch of several: the same schedule and picture size, any prompts. A row may come several times."""
        first = rows[0]
        if len(rows) == 1:
            return first
        every = {field.name: [getattr(row, field.name) for row in rows] for field in fields(first)}
        calls = {name: _cat(parts) for name, parts in every.items() if name not in ("txt", "cos", "sin")}
        return replace(first, txt=torch.cat(every["txt"]), **calls)

    def at(self, call: int) -> Self:
        """What one call reads: the same without the axis of calls."""
        return replace(
            self,
            double=tuple((img_mod[call], txt_mod[call]) for img_mod, txt_mod in self.double),
            single=tuple(mod[call] for mod in self.single),
        )

    def of(self, rows: BatchRows) -> Self:
        """Some rows of the batch alone."""
        calls = {f.name: _of(getattr(self, f.name), rows) for f in fields(self) if f.name not in ("txt", "cos", "sin")}
        return replace(self, txt=self.txt[rows], **calls)


def _cat(parts: Sequence[Any]) -> Any:
    """Several (S, B, ...), or tuples of them, as one batch."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts), dim=1)
    return tuple(_cat(some) for some in zip(*parts, strict=True))


def _of(value: Any, rows: BatchRows) -> Any:
    """Some rows of (S, B, ...), or of a tuple of them."""
    return value[:, rows] if isinstance(value, Tensor) else tuple(_of(one, rows) for one in value)


@dataclass(frozen=True)
class FluxStatics(TrunkStatics):
    """What `Flux.precompute` makes."""

    final: Tensor
    """(S, B, 2, 1, D): shift, scale of the last layer."""

    def at(self, call: int) -> Self:
        return replace(super().at(call), final=self.final[call])


def patchify(latent: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> tokens of 2 x 2 patches (B, h w / 4, 4 C), channel-major within a token."""
    b, c, h, w = latent.shape
    patches = latent.reshape(b, c, h // 2, 2, w // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpatchify(tokens: Tensor, h: int, w: int) -> Tensor:
    """Tokens (B, h w / 4, 4 C) -> latents (B, C, h, w); undoes `patchify`."""
    b, _, width = tokens.shape
    patches = tokens.reshape(b, h // 2, w // 2, width // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, width // 4, h, w)


class MLPEmbedder(nn.Module):
    """Two linears with SiLU between. (..., in_dim) -> (..., D)."""

    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(nn.functional.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.scale)


class QKNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)


class SelfAttention(nn.Module):
    """Holds one stream's attention weights; the blocks run the attention, since both streams share it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor | Rows, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D), and the rotary tables of its tokens -> q, k and v, each (B, H, L, head_dim)."""
        return split_heads(linear(self.qkv, x), self.num_heads, self.norm, cos, sin)


def split_heads(qkv: Tensor, num_heads: int, norm: QKNorm, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3 D) -> normalised and rotated q and k, plain v, each (B, H, L, head_dim)."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return *ops.qk_norm_rotary(q, k, norm.query_norm.scale, norm.key_norm.scale, cos, sin), v


class Modulation(nn.Module):
    """One linear that turns the conditioning vector into `parts` rows of width D."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(dim, parts * dim)

    def forward(self, activated: Tensor) -> Tensor:
        """activated (S, B, D), already through SiLU -> (S, B, parts, 1, D)."""
        return self.lin(activated).unflatten(-1, (self.parts, 1, -1))


class DoubleStreamBlock(nn.Module):
    """Image and text keep their own weights and meet in one attention."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.img_mod = Modulation(dim, 6)
        self.img_attn = SelfAttention(dim, num_heads)
        self.img_mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU("tanh"), nn.Linear(mlp_dim, dim))
        self.txt_mod = Modulation(dim, 6)
        self.txt_attn = SelfAttention(dim, num_heads)
        self.txt_mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU("tanh"), nn.Linear(mlp_dim, dim))

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        img_mod: Tensor,
        txt_mod: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """img (B, Li, D), txt (B, Lt, D); img_mod and txt_mod (B, 6, 1, D) -> the same two shapes."""
        i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = img_mod.unbind(1)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = txt_mod.unbind(1)

        text = txt.shape[1]
        txt_in = modulated(self.txt_attn.qkv, txt, t_shift1, t_scale1)
        img_in = modulated(self.img_attn.qkv, img, i_shift1, i_scale1)
        streams = zip(
            self.txt_attn.project(txt_in, cos[:text], sin[:text]),
            self.img_attn.project(img_in, cos[text:], sin[text:]),
            strict=True,
        )
        q, k, v = (torch.cat(stream, dim=2) for stream in streams)  # each (B, H, Lt + Li, head_dim)
        mixed = merge_heads(attention(q, k, v))
        # Contiguous, because torch multiplies a strided batch by another path, with other rounding than one picture.
        txt_update, img_update = mixed[:, :text].contiguous(), mixed[:, text:].contiguous()

        img = linear(self.img_attn.proj, img_update, residual=img, gate=i_gate1)
        img = self._mlp(self.img_mlp, img, i_shift2, i_scale2, i_gate2)
        txt = linear(self.txt_attn.proj, txt_update, residual=txt, gate=t_gate1)
        txt = self._mlp(self.txt_mlp, txt, t_shift2, t_scale2, t_gate2)
        return img, txt

    @staticmethod
    def _mlp(mlp: nn.Sequential, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        hidden = linear(mlp[0], modulated(mlp[0], x, shift, scale), gelu=True)
        return linear(mlp[2], hidden, residual=x, gate=gate)


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on the joined tokens (arXiv 2302.05442), two linears in all."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_width = 3 * dim
        self.linear1 = nn.Linear(dim, 3 * dim + mlp_dim)
        self.linear2 = nn.Linear(dim + mlp_dim, dim)
        self.norm = QKNorm(dim // num_heads)
        self.modulation = Modulation(dim, 3)

    def forward(self, x: Tensor, mod: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, L, D), mod (B, 3, 1, D) -> (B, L, D)."""
        shift, scale, gate = mod.unbind(1)
        qkv, mlp = linear_and_gelu(self.linear1, modulated(self.linear1, x, shift, scale), self.qkv_width)
        mixed = attention(*split_heads(qkv, self.num_heads, self.norm, cos, sin))
        return linear(self.linear2, torch.cat((merge_heads(mixed), mlp), dim=-1), residual=x, gate=gate)


class LastLayer(nn.Module):
    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_channels)
        # The Sequential is there for the checkpoint key `adaLN_modulation.1`; precompute applies SiLU once for all.
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        """x (B, L, D), mod (B, 2, 1, D) -> (B, L, out_channels)."""
        shift, scale = mod.unbind(1)
        return self.linear(ops.layer_norm_modulate(x, shift, scale))


class FluxTrunk(Stepwise):
    """What the transformer and its ControlNets have in common: the embeddings and the blocks."""

    alike: ClassVar[bool] = True
    precomputed: ClassVar[str] = (
        r"(txt_in|time_in|vector_in|guidance_in|controlnet_mode_embedder)\..*"
        r"|.*_blocks\.\d+\.(img_mod|txt_mod|modulation)\..*|final_layer\.adaLN_modulation\..*"
    )
    """Parameters that only `precompute` reads, as a regular expression: 3.3 of FLUX.1's 11.9 billion numbers."""
    blocks: ClassVar[str] = r"(double|single)_blocks\..*"
    """Parameters that may leave the device with these, or between steps and pictures. The rest is small, and stays."""

    def __init__(self, params: FluxTrunkParams) -> None:
        super().__init__()
        dim, heads = params.hidden_size, params.num_heads
        mlp_dim = int(dim * params.mlp_ratio)
        self.guidance_embed, self.axes_dim, self.theta = params.guidance_embed, params.axes_dim, params.theta
        self.img_in = nn.Linear(params.in_channels, dim)
        self.txt_in = nn.Linear(params.context_in_dim, dim)
        self.time_in = MLPEmbedder(256, dim)
        self.vector_in = MLPEmbedder(params.vec_in_dim, dim)
        if params.guidance_embed:
            self.guidance_in = MLPEmbedder(256, dim)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(dim, heads, mlp_dim) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(dim, heads, mlp_dim) for _ in range(params.depth_single_blocks)
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.img_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.img_in.weight.device

    def condition(self, pooled: Tensor, timesteps: Tensor, guidance: Tensor | None) -> Tensor:
        """What every modulation is made of, (S, B, D), already through SiLU; the inputs are those of `precompute`."""
        if (guidance is not None) != self.guidance_embed:
            raise ValueError(f"guidance_embed is {self.guidance_embed}, guidance is {guidance!r}")
        dtype = self.dtype
        batch = pooled.shape[0]
        t = timesteps if timesteps.dim() == 2 else timesteps[:, None].expand(-1, batch)
        calls = t.shape[0]
        vec = self.time_in(ops.sinusoidal_embedding(t.reshape(-1), 256).to(dtype))
        vec = vec.unflatten(0, (calls, batch))
        if guidance is not None:
            vec = vec + self.guidance_in(ops.sinusoidal_embedding(guidance, 256).to(dtype))
        vec = vec + self.vector_in(pooled.to(dtype))
        return nn.functional.silu(vec)

    def prepare(self, txt: Tensor, img_ids: Tensor, activated: Tensor) -> TrunkStatics:
        """The blocks' part of `precompute`, for embedded text tokens (B, Lt, D) and what `condition` gave."""
        double_blocks = cast("Iterable[DoubleStreamBlock]", self.double_blocks)
        single_blocks = cast("Iterable[SingleStreamBlock]", self.single_blocks)
        txt_ids = img_ids.new_zeros(txt.shape[1], img_ids.shape[1])
        cos, sin = ops.rotary_tables(torch.cat((txt_ids, img_ids)), self.axes_dim, self.theta)
        return TrunkStatics(
            txt=txt,
            cos=cos,
            sin=sin,
            double=tuple((b.img_mod(activated), b.txt_mod(activated)) for b in double_blocks),
            single=tuple(b.modulation(activated) for b in single_blocks),
        )


class Flux(FluxTrunk):
    """FLUX.1: predicts the flow-matching velocity of packed latent tokens."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__(params)
        self.params = params
        self.final_layer = LastLayer(params.hidden_size, params.out_channels)

    def precompute(
        self,
        context: Tensor,
        pooled: Tensor,
        img_ids: Tensor,
        timesteps: Tensor,
        guidance: Tensor | None,
    ) -> FluxStatics:
        """Everything that does not depend on the latent, for all calls at once.

        context (B, Lt, context_in_dim): T5 tokens. pooled (B, vec_in_dim): CLIP's pooled output.
        img_ids (Li, 3): image token positions (index, row, column); text tokens all sit at zero.
        timesteps (S,) in [0, 1], one per call, or (S, B) if the rows differ. guidance (B,), or None for a network
        without a guidance embedding (passing one to such a network is a programming error).
        """
        activated = self.condition(pooled, timesteps, guidance)
        trunk = self.prepare(self.txt_in(context.to(self.dtype)), img_ids, activated)
        final = self.final_layer.adaLN_modulation[1](activated).unflatten(-1, (2, 1, -1))
        return FluxStatics(**vars(trunk), final=final)

    def forward(self, x: Tensor, call: int, statics: FluxStatics, residuals: Residuals | None = None) -> Tensor:
        """Velocity at call number `call`. x (B, Li, in_channels) -> (B, Li, out_channels), in the weights' dtype.

        `residuals` are added to the image tokens after each block: a slot (B, Li, D) for every double block, then one
        for every single block.
        """
        return self.call_step(self.predict, x, statics.at(call), residuals)

    def predict(self, x: Tensor, statics: FluxStatics, residuals: Residuals | None) -> Tensor:
        """`forward` with what one call reads of the statics, as the four parts of it."""
        return self.leave(self.rest(self.first(self.enter(x), statics), statics, residuals), statics)

    def enter(self, x: Tensor) -> Tensor:
        """x (B, Li, in_channels) -> image tokens (B, Li, D)."""
        return self.img_in(x.to(self.dtype))

    def first(self, img: Tensor, statics: FluxStatics) -> tuple[Tensor, Tensor]:
        """Image and text tokens after the first double block, if there is one, without its residual."""
        if not statics.double:
            return img, statics.txt
        return self.call_block(self.double_blocks[0], img, statics.txt, *statics.double[0], statics.cos, statics.sin)

    def rest(self, tokens: tuple[Tensor, Tensor], statics: FluxStatics, residuals: Residuals | None) -> Tensor:
        """What `first` gave -> image tokens (B, Li, D) after the last block, the first block's residual included."""
        img, txt = tokens
        del tokens  # so that they are gone once the next block has run
        cos, sin = statics.cos, statics.sin
        slots = self._slots(residuals)
        depth = len(self.double_blocks)
        doubles = zip(self.double_blocks, statics.double, slots[:depth], strict=True)
        for number, (block, (img_mod, txt_mod), residual) in enumerate(doubles):
            if number > 0:
                img, txt = self.call_block(block, img, txt, img_mod, txt_mod, cos, sin)
            if residual is not None:
                img = ops.add_residual(img, residual)
        length = txt.shape[1]
        joined = torch.cat((txt, img), dim=1)  # (B, Lt + Li, D)
        for block, mod, residual in zip(self.single_blocks, statics.single, slots[depth:], strict=True):
            joined = self.call_block(block, joined, mod, cos, sin)
            if residual is not None:
                joined = torch.cat((joined[:, :length], ops.add_residual(joined[:, length:], residual)), dim=1)
        return joined[:, length:]

    def leave(self, img: Tensor, statics: FluxStatics) -> Tensor:
        """Image tokens after the last block -> velocity (B, Li, out_channels)."""
        return self.final_layer(img, statics.final)

    def _slots(self, residuals: Residuals | None) -> Residuals:
        count = len(self.double_blocks) + len(self.single_blocks)
        if residuals is None:
            return (None,) * count
        if len(residuals) != count:
            raise ValueError(f"{len(residuals)} residuals for a network of {count} blocks")
        return residuals
