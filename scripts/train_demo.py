"""Train the demo models on pictures this repository draws. Two CPU cores are enough.

    python scripts/train_demo.py tokenizers        # CLIP's, and T5's from our captions
    python scripts/train_demo.py text              # both text encoders learn to read the captions
    python scripts/train_demo.py vae               # the autoencoder
    python scripts/train_demo.py latents           # draw the pictures, keep their latents
    python scripts/train_demo.py captions          # write the captions, keep them encoded
    python scripts/train_demo.py base              # the transformer
    python scripts/train_demo.py dev               # from it demo-dev, with guidance
    python scripts/train_demo.py schnell           # and demo-schnell, for few steps
    python scripts/train_demo.py sdxl-vae          # SDXL's autoencoder
    python scripts/train_demo.py sdxl-text         # its second text encoder; the first is FLUX's
    python scripts/train_demo.py sdxl-base         # the UNet, on latents of --vae sdxl-vae
    python scripts/train_demo.py sdxl-turbo        # and demo-sdxl-turbo
    python scripts/train_demo.py fill              # demo-fill, which is demo-schnell with eyes
    python scripts/train_demo.py canny             # a ControlNet for demo-schnell
    python scripts/train_demo.py sdxl-canny        # and one for demo-sdxl
    python scripts/train_demo.py checker           # the safety checker, which finds crescents
    python scripts/train_demo.py export            # into weights/, with hashes and curves
    python scripts/train_demo.py checkpoint RUN    # keep what a run has reached in weights/checkpoints

Every part keeps a checkpoint under out/train and goes on from it when started again. Weights that are published are a
moving average of the trained ones. `text` and `vae` do not need one another and can run side by side, a thread each;
two threads that contend for a core are slower than one.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from training import checker, control, export, fill, flux, latents, text, unet, vae  # noqa: E402

from flux_engine.sizes import MEGAPIXELS  # noqa: E402


def main() -> None:
    """Read the command line and run one part."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    commands = parser.add_subparsers(required=True, metavar="PART")

    tokenizers = commands.add_parser("tokenizers")
    tokenizers.add_argument(
        "--vocabulary", type=Path, help="CLIP's bpe_simple_vocab_16e6.txt.gz (MIT); left out: the tokenizer in weights/"
    )
    tokenizers.set_defaults(run=text.make_tokenizers)

    def part(name: str, run: object, *, steps: int, lr: float, batch: int = 0) -> argparse.ArgumentParser:
        command = commands.add_parser(name)
        command.add_argument("--steps", type=int, default=steps)
        command.add_argument("--lr", type=float, default=lr)
        if batch:
            command.add_argument("--batch", type=int, default=batch)
        command.set_defaults(run=run)
        return command

    part("text", text.train_text, steps=3000, lr=2e-3, batch=64)
    part("sdxl-text", text.train_paired, steps=3000, lr=2e-3, batch=64)
    for name, classes, steps in (("vae", MEGAPIXELS, 5000), ("sdxl-vae", MEGAPIXELS[:1], 3000)):
        encoder = part(name, vae.train_vae, steps=steps, lr=1.5e-3)
        encoder.add_argument("--kl", type=float, default=5e-4)
        encoder.add_argument("--start", type=Path, help="weights to start from, a safetensors file")
        encoder.set_defaults(run_name=name, classes=classes)

    pictures = commands.add_parser("latents")
    pictures.add_argument("--megapixels", choices=("1", "0.25"), default="1")
    pictures.add_argument("--count", type=int, default=1000, help="pictures of a size; square ones twice as many")
    pictures.add_argument("--vae", choices=vae.PARAMS, default="vae")
    pictures.add_argument("--layout", choices=latents.LAYOUTS, default="middle")
    pictures.set_defaults(run=latents.make_latents)
    commands.add_parser("captions").set_defaults(run=latents.make_texts)

    for name, run, steps, lr, batch in (
        ("base", flux.train_base, 10_000, 1.2e-3, 18),
        ("dev", flux.train_dev, 500, 4e-4, 16),
        ("schnell", flux.train_schnell, 600, 4e-4, 16),
        ("sdxl-base", unet.train_base, 8000, 5e-4, 16),
        ("sdxl-turbo", unet.train_turbo, 600, 2e-4, 16),
    ):
        command = part(name, run, steps=steps, lr=lr, batch=batch)
        command.add_argument("--large", type=float, default=0.35, help="share of batches at the full megapixel")
        command.add_argument("--free", type=float, default=0.1, help="share of pictures whose objects are anywhere")
        if "base" in name:
            command.add_argument("--start", type=Path, help="weights to start from, a safetensors file")
        if name == "base":
            command.add_argument("--thin", type=float, default=0.8, help="share of those with half of their tokens")

    part("fill", fill.train_fill, steps=1000, lr=1e-3, batch=8)
    for name, run, reading, steps in (
        ("canny", control.train_flux, 600, 500),
        ("sdxl-canny", control.train_unet, 400, 250),
    ):
        command = part(name, run, steps=steps, lr=1e-3, batch=8)
        command.add_argument("--reading", type=int, default=reading, help="steps to read edges, before those to steer")

    finder = part("checker", checker.train_checker, steps=4000, lr=3e-3, batch=32)
    finder.add_argument("--count", type=int, default=320, help="pictures of a size")

    kept = commands.add_parser("checkpoint")
    kept.add_argument("names", nargs="+", metavar="RUN")
    kept.set_defaults(run=export.checkpoint)
    commands.add_parser("export").set_defaults(run=export.export)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
