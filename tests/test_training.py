"""The training asks for what is in the pictures, and goes on as if it had never been stopped."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomise, relative_error
from safetensors.torch import save_file
from torch import Tensor, nn
from training import batches, flux, hints, lora, run, unet, vae
from training.export import WEIGHTS
from training.latents import Pool, arrange, boxes_of, coverage_maps
from transformers import CLIPTokenizer

import flux_engine
from benchmarks import world
from benchmarks.world import Ground, Scene, Thing
from flux_engine.families.flux import image_ids, unpatchify
from flux_engine.models.flux import Flux
from flux_engine.schedulers import sigma_at
from flux_engine.specs import DEMO_SDXL

WIDTH, HEIGHT = 160, 112


def pool_of(*scenes: Scene) -> Pool:
    """Drawn pictures' geometry, without their latents."""
    rng = random.Random(3)
    settled = [arrange(scene, "free", WIDTH, HEIGHT, rng) for scene in scenes]
    maps = [torch.from_numpy(coverage_maps(scene, placed, WIDTH, HEIGHT)) for scene, placed in settled]
    return Pool(
        WIDTH, HEIGHT, list(scenes), torch.zeros(len(scenes), 1), torch.stack(maps),
        torch.tensor([boxes_of(placed) for _, placed in settled]),
    )  # fmt: skip


@pytest.mark.parametrize("shape", hints.SHAPES)
def test_distances_agree_with_what_is_painted(shape: str) -> None:
    pool = pool_of(*(Scene((Thing(shape, "red", size),)) for size in world.SIZES))
    answers = hints.Asked(pool).answers([0, 1, 2])
    edges, cover = (value[..., : hints.CELLS**2] for value in (answers.edges, answers.cover))
    assert (edges[cover > 0.99] < 0).all()
    assert (edges[cover < 0.01] > 0).all()
    assert edges[(cover > 0.4) & (cover < 0.6)].abs().mean() < 0.08  # half covered: the outline, to a pixel
    assert edges.min() < -0.5 and edges.max() > 0.9
    assert (answers.outlined[..., : hints.CELLS**2] == 1).all() and (answers.outlined[..., hints.CELLS**2 :] == 0).all()


def test_tokens_are_asked_the_way_to_the_objects() -> None:
    pool = pool_of(Scene((Thing("circle", "red", "small"), Thing("star", "blue", "small")), relation="left of"))
    facts = hints.Asked(pool).answers([0]).facts[0].view(HEIGHT // 16, WIDTH // 16, -1)
    first_x, first_y, second_x, _ = facts[..., hints.TOWARDS].unbind(-1)
    assert (first_x[:, 0] > 0).all() and (first_x[:, -1] < 0).all()
    assert (first_y[0] > 0).all() and (first_y[-1] < 0).all()
    assert (first_x < second_x).all()


def test_in_the_middle_layout_only_what_has_no_middle_is_left_to_chance() -> None:
    scene = Scene((Thing("circle"), Thing("star")), Ground("striped", "red", "white", "x"))
    drawn = [arrange(scene, "middle", WIDTH, HEIGHT, random.Random(seed)) for seed in range(8)]
    assert len({tuple((p.cx, p.cy, p.radius) for p in placed) for _, placed in drawn}) == 1
    assert drawn[0][0].relation == "left of"
    assert len({scene.things[0].color for scene, _ in drawn}) > 1
    free = [arrange(scene, "free", WIDTH, HEIGHT, random.Random(seed))[1][0] for seed in range(8)]
    assert len({(p.cx, p.cy) for p in free}) == 8


def test_looking_inside_changes_nothing() -> None:
    net = Flux(flux.PARAMS)
    randomise(net, 0)
    x, t = torch.randn(2, 35, 64), torch.tensor([[1.0, 0.5]])
    statics = net.precompute(torch.randn(2, 40, 64), torch.randn(2, 64), image_ids(5, 7), t, None)
    before = net(x, 0, statics)
    velocity, facts, edges, drawn = flux.Traced(net)(x, statics)
    assert torch.equal(velocity, before)
    assert facts.shape == (2, 35, hints.FACTS)
    assert edges.shape == (2, 35, hints.EDGES) and drawn.shape == (2, 35, hints.EDGES + hints.COVERS)


def batch_of(settled: list[bool], size: tuple[int, int] = (16, 64)) -> batches.Batch:
    """Pure noise over latents, with nothing that a walk does not look at."""
    count = len(settled)
    return batches.Batch(
        x0=torch.randn(count, *size), noise=torch.randn(count, *size), t=torch.ones(count),
        tokens=torch.empty(0), pooled=torch.empty(0), positions=torch.empty(0), captioned=torch.empty(0),
        settled=torch.tensor(settled), guidance=torch.ones(count), weight=torch.ones(count, size[0]),
        size=(64, 64), answers=None,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


@pytest.mark.parametrize("steps", [2, 4, 28])
def test_a_walk_ends_at_the_picture_if_every_step_is_right(steps: int) -> None:
    batch = batch_of([True, True])
    walk = batches.Walk(batch, batch.noise, batches.evenly(steps))
    for _ in range(steps - 1):
        assert walk.go(walk.batch.velocity(walk.x))
    assert not walk.go(walk.batch.velocity(walk.x))
    assert relative_error(walk.x, batch.x0) < 1e-5


def test_a_walk_keeps_what_the_network_missed_but_where_the_caption_leaves_much_open() -> None:
    batch = batch_of([True, False])
    walk = batches.Walk(batch, batch.noise, batches.evenly(4))
    walk.go(walk.batch.velocity(walk.x) + 1)
    assert torch.allclose(walk.x[0], walk.batch.mixed[0] - 0.25, atol=1e-5)
    assert torch.equal(walk.x[1], walk.batch.mixed[1])


def test_walks_of_different_sizes_end_and_make_room_for_others() -> None:
    class Sizes:
        def draw(self, rng: random.Random, *_: object, **__: object) -> batches.Batch:
            return batch_of([True], size=(rng.choice((9, 16)), 4))

    walks, rng, seen = batches.Walks(Sizes(), [batches.evenly(2), batches.evenly(4)]), random.Random(0), set[int]()  # pyright: ignore[reportArgumentType]
    for _ in range(200):
        walk = walks.take(rng)
        seen.add(id(walk.batch.x0))
        walks.go(walk, walk.batch.velocity(walk.x))
        assert len(walks.under_way) <= batches.WALKS
    assert len(seen) > 2 * batches.WALKS


def test_guidance_is_taught_where_there_is_much_noise() -> None:
    scales = flux.strength(torch.tensor([0.0, 0.5, 1.0, 3.5, 3.5]), torch.tensor([0.2, 0.8, 0.8, 0.8, 0.2]))
    assert scales.tolist() == [0.0, 0.5, 1.0, 2.25, 1.0]


def test_the_faster_operations_are_the_same() -> None:
    q, k, v = torch.randn(3, 2, 3, 9, 64).unbind(0)
    angles = torch.rand(9, 32)
    rotated = flux.complex_rotary(q, angles.cos(), angles.sin())
    assert torch.equal(rotated, flux.ops.apply_rotary(q, angles.cos(), angles.sin()))
    assert relative_error(flux.explicit_attention(q, k, v), flux.flux_engine.models.flux.attention(q, k, v)) < 1e-5


def test_a_run_that_was_stopped_goes_on_as_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(steps: int, folder: Path) -> dict[str, Tensor]:
        monkeypatch.setattr(run, "OUT", folder)
        torch.manual_seed(0)
        net = nn.Linear(4, 4)
        trained = run.Run("line", net, [torch.optim.AdamW(net.parameters(), lr=0.1)], steps=steps, ema=0.9)
        monkeypatch.setattr(trained, "factor", lambda: 1.0)  # not that of a shorter run

        def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
            x = torch.randn(3, 4) + rng.random()
            return (net(x) - x.flip(-1)).square().mean(), {}

        trained.train(loss_of)
        return trained.averaged()

    whole = train(8, tmp_path / "whole")
    train(3, tmp_path / "parts")
    rest = train(8, tmp_path / "parts")
    assert all(torch.equal(rest[name], whole[name]) for name in whole)
    assert torch.equal(run.read_average("line")["weight"], whole["weight"])


def test_the_autoencoder_trains_on_pieces_with_an_object_in_them() -> None:
    rng = random.Random(2)
    pieces = [vae.around_an_object(rng, "0.25") for _ in range(12)]
    assert {piece.size for piece in pieces} == {(64, 64)}
    colors = [piece.getcolors(64 * 64) or [] for piece in pieces]
    assert all(len([count for count, _ in found if count > 40]) > 1 for found in colors)


def test_muon_in_float32_makes_a_gradient_orthogonal() -> None:
    for shape in ((8, 24), (24, 8)):
        grad = torch.randn(shape)
        ours = flux.orthogonal(grad, (3.4445, -4.775, 2.0315), 5, 1e-7)
        assert (torch.linalg.svdvals(ours) - 1).abs().max() < 0.5
        u, _, v = torch.linalg.svd(grad, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(ours.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_a_unet_that_is_right_gives_the_flow_its_velocity() -> None:
    """Of a picture with noise as SDXL has it, through v and back, at every noise level but pure noise."""
    batch = replace(batch_of([True] * 5, (16, 16)), t=torch.tensor([0.05, 0.3, 0.6, 0.9, 0.93]))
    x0, noise = (unpatchify(tokens, 8, 8) for tokens in (batch.x0, batch.noise))
    seen: list[torch.Tensor] = []

    class Right(torch.nn.Module):
        def precompute(self, *told: torch.Tensor) -> torch.Tensor:
            seen.append(told[3])
            return told[3]

        def forward(self, x: torch.Tensor, call: int, timesteps: torch.Tensor) -> torch.Tensor:
            t = batch.t[:, None, None, None]
            length = (t**2 + (1 - t) ** 2).sqrt()
            assert torch.allclose(x, ((1 - t) * x0 + t * noise) / length, atol=1e-6)
            return (1 - t) / length * noise - t / length * x0

    traced = unet.Traced(unet.new_unet())
    traced.unet = Right()  # pyright: ignore[reportAttributeAccessIssue]
    assert relative_error(traced.velocity(batch.mixed, batch), batch.noise - batch.x0) < 1e-4
    for t, timestep in zip(batch.t.tolist(), seen[0][0].tolist(), strict=True):
        assert sigma_at(DEMO_SDXL.schedule, timestep) == pytest.approx(t / (1 - t), rel=1e-3)


def test_pure_noise_has_a_timestep_where_samplers_begin() -> None:
    timesteps, sigma = unet.discrete(torch.ones(200))
    low, high = unet.FIRST_TIMESTEPS
    assert low <= timesteps.min() < timesteps.max() <= high
    assert sigma.min() > 7 and sigma.max() < 14.7


def test_the_paired_encoders_read_what_the_family_reads(tmp_path: Path) -> None:
    """Training reads captions as requests do, for which both have a tokenizer and a padding of their own."""
    tokenizers = WEIGHTS / "demo" / "flux" / "tokenizer", WEIGHTS / "demo" / "sdxl" / "tokenizer_2"
    first, second = (CLIPTokenizer.from_pretrained(folder) for folder in tokenizers)
    assert (first.pad_token, second.pad_token) == ("<|endoftext|>", "!")
    assert first("a red circle").input_ids == second("a red circle").input_ids


def test_a_walk_of_few_steps_ends_at_the_picture_if_every_step_is_right() -> None:
    batch = batch_of([True, True])
    walks = lora.Renoised(None, [lora.LCM_TIMES])  # pyright: ignore[reportArgumentType]
    walk = batches.Walk(batch, batch.noise, lora.LCM_TIMES)
    walks.under_way = [walk]
    for t in lora.LCM_TIMES[1:]:
        before = walk.batch.noise
        walks.go(walk, walk.batch.velocity(walk.x))
        assert (walk.batch.t == t).all()
        assert not torch.equal(walk.batch.noise, before)
        assert torch.allclose(walk.x, (1 - t) * batch.x0 + t * walk.batch.noise, atol=1e-5)
    assert not walks.under_way
    assert torch.allclose(walk.x, batch.x0, atol=1e-5)


@pytest.mark.parametrize("model", ["demo-dev", "demo-sdxl"])
def test_what_is_written_of_a_lora_is_what_was_trained(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under both kinds of names: joined and split linears, convolutions."""
    monkeypatch.setattr(lora, "load_text", lambda: None)
    monkeypatch.setattr(lora, "load_paired", lambda: None)
    subject = lora.subject_of(model, 4)
    generator = torch.Generator().manual_seed(0)
    pairs: lora.Pairs = {}
    for name, pair in subject.adapters.items():
        assert isinstance(pair, lora.LowRank)
        pair.b.data = torch.randn(pair.b.shape, generator=generator) * 0.1
        pairs[name.replace("/", ".")] = pair.a.detach(), pair.b.detach()
    assert any(subject.net.get_submodule(name).weight.ndim == 4 for name in pairs) == (model == "demo-sdxl")
    engine = flux_engine.load(model, device="cpu", dtype="float32")
    for kind, tensors in (("peft", lora.peft(subject, pairs)), ("kohya", lora.kohya(subject, pairs))):
        path = tmp_path / f"{kind}.safetensors"
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
        engine.lora.set([path])
        merged = engine._pipeline.family.net
        for name in pairs:
            trained = subject.net.get_submodule(name).weight
            assert (merged.get_submodule(name).weight - trained).abs().max() <= 1e-5 * trained.abs().max(), name
            base = subject.net.get_submodule(name).parametrizations.weight.original
            assert (merged.get_submodule(name).weight - base).abs().max() > 5e-3 * trained.abs().max()
