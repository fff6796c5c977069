"""Guided sampling from one U-Net with the same weights, here and in imagen-pytorch.

    python -m benchmarks.sampling                     # CPU: the 14 M U-Net of benchmarks.unet
    python -m benchmarks.sampling --paper             # GPU: the paper-sized cascade, ours alone
    python -m benchmarks.sampling --rounds 1 --steps 4 --original-steps 8   # a quick try

The first command compares equal numbers of steps of the same sampler (ancestral), then our default
with the original's default of 250 steps. The sides take turns, each in its own process; compilation
and warm-up are not timed. Prints a table of medians over the rounds; ratios above 1 mean that ours
is faster. `--paper` prints, for our default steps and for `--original-steps` steps of the
reference's sampler, the seconds of each stage alone and of the cascade, and the peak memory up to
then, in bfloat16, without the text encoder.
Weights are random on both sides: they cost as much as trained ones. Needs what `make test`
installs.
"""

import argparse
import concurrent.futures
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import commands
from benchmarks.unet import COND_SCALE, SIZE, UNET, hardware

BATCH, TIMED, TEXT_LEN = 4, 2, 32
DEFAULT = "default"
"""Our few steps (`pipeline.sampling_defaults`)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="processes per side")
    parser.add_argument("--steps", type=int, default=50, help="steps of both sides, where equal")
    parser.add_argument(
        "--original-steps",
        type=int,
        default=250,
        help="the original's steps, to compare with our default",
    )
    parser.add_argument(
        "--paper", action="store_true", help="time the paper-sized cascade, only ours"
    )
    parser.add_argument("--preset", default="imagen", help="cascade for --paper, such as tiny")
    parser.add_argument("--side", choices=("jax", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    commands.keep_memory()
    if args.paper:
        print(paper(args.preset, args.original_steps))
    elif args.side:
        run = {"jax": run_jax, "torch": run_torch}[args.side]
        print(json.dumps(run(args.weights, args.steps, args.original_steps)))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    runs = {"jax": [], "torch": []}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "unet.npz"
        for number in range(args.rounds):
            for side in ("torch", "jax"):  # the first writes the weights that all others read
                print(f"round {number + 1} of {args.rounds}: {side}", file=sys.stderr)
                command = [sys.executable, "-m", "benchmarks.sampling", "--side", side]
                command += ["--weights", str(weights), "--steps", str(args.steps)]
                command += ["--original-steps", str(args.original_steps)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    print(table(runs))


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    """Medians over the rounds, and of the ratios of their pairs."""
    lines = [
        f"Hardware: {hardware()}; {BATCH} images of {SIZE} pixels, guided",
        "",
        "| steps | ours, s | steps | imagen-pytorch, s | times faster |",
        "|---|---|---|---|---|",
    ]
    for (ours, _), (theirs, _) in zip(
        runs["jax"][0].items(), runs["torch"][0].items(), strict=True
    ):
        a, b = (
            [one[name] for one in runs[side]] for side, name in (("jax", ours), ("torch", theirs))
        )
        ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
        lines.append(
            f"| {ours} | {statistics.median(a):.2f} | {theirs} | {statistics.median(b):.2f} | "
            f"{ratio:.2f} |"
        )
    return "\n".join(lines)


def timed(draw: Callable[[], object], *, warm: bool = True) -> float:
    """The median of a few calls, the first left out, unless all is compiled."""
    if warm:
        draw()
    seconds = []
    for _ in range(TIMED):
        began = time.perf_counter()
        draw()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def run_torch(weights: Path, steps: int, original_steps: int) -> dict[str, float]:
    from imagen_jax.interop.reference import import_imagen_pytorch

    original = import_imagen_pytorch()
    import numpy as np
    import torch

    torch.manual_seed(0)
    unet = original.Unet(**UNET)
    if weights.exists():
        with np.load(weights) as saved:
            unet.load_state_dict({name: torch.from_numpy(saved[name]) for name in saved})
    else:
        np.savez(weights, **{name: value.numpy() for name, value in unet.state_dict().items()})
    texts = torch.randn(BATCH, TEXT_LEN, UNET["text_embed_dim"])

    def seconds(count: int) -> float:
        imagen = original.Imagen(unet, image_sizes=SIZE, text_embed_dim=512, timesteps=count)
        given = dict(text_embeds=texts, cond_scale=COND_SCALE, use_tqdm=False)
        return timed(lambda: imagen.sample(**given))

    return {f"{count}": seconds(count) for count in (steps, original_steps)}


def run_jax(weights: Path, steps: int, original_steps: int) -> dict[str, float]:
    import jax
    import numpy as np

    import imagen_jax
    from imagen_jax import nn
    from imagen_jax.interop import keys
    from imagen_jax.pipeline import sampling_defaults

    config = imagen_jax.ImagenConfig(
        unets=imagen_jax.UnetConfig(**UNET), image_sizes=SIZE, text_embed_dim=512
    )
    unet = config.unets[0]
    with np.load(weights) as saved:
        params = keys.to_jax(dict(saved), nn.abstract(unet)[1])
    params = jax.tree.map(jax.numpy.asarray, params)
    imagen = imagen_jax.Imagen(config, unets=[nn.bind(unet, params)])
    texts = np.random.default_rng(0).standard_normal(
        (BATCH, TEXT_LEN, UNET["text_embed_dim"]), np.float32
    )
    default = sampling_defaults(config)
    few = f"{default['timesteps'][0]} ({default['sampler']}, {DEFAULT})"
    choices = {f"{steps}": dict(timesteps=steps), few: default}

    def seconds(**chosen) -> float:
        given = chosen | dict(cond_scale=COND_SCALE, text_embeds=texts, key=jax.random.key(0))
        return timed(lambda: jax.block_until_ready(imagen.sample(**given)))

    return {name: seconds(**chosen) for name, chosen in choices.items()}


def paper(preset: str, original_steps: int) -> str:
    """Seconds of each stage alone and of the cascade, one image at a time, and the memory.

    Weights are random and in bfloat16; every program is compiled first, side by side.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import imagen_jax
    from imagen_jax import nn, presets
    from imagen_jax.pipeline import sampling_defaults

    config, dtype = presets.PRESETS[preset](), jnp.bfloat16
    size = sum(x.size for unet in config.unets for x in jax.tree.leaves(nn.abstract(unet)[1]))

    def draw_weights(shape):  # array by array: float32 weights of all would be the peak
        return 0.02 * jax.random.normal(jax.random.key(0), shape.shape, dtype)

    unets = [
        nn.bind(unet, jax.tree.map(draw_weights, nn.abstract(unet)[1]), dtype=dtype)
        for unet in config.unets
    ]
    imagen = imagen_jax.Imagen(config, unets=unets)
    shape = (1, config.text_len, config.text_embed_dim)
    texts = np.random.default_rng(0).standard_normal(shape, np.float32)
    few, count = sampling_defaults(config), len(config.unets)
    many = dict(timesteps=(original_steps,) * count, cond_scale=few["cond_scale"])

    def draw(first: int, last: int, **chosen) -> None:
        given = dict(start_at_unet_number=first, stop_at_unet_number=last, text_embeds=texts)
        if first > 1:
            pixels = config.image_sizes[first - 2]
            given["start_image_or_video"] = np.full((1, pixels, pixels, 3), 0.5, np.float32)
        images = imagen.sample(key=jax.random.key(0), **given, **chosen)
        if not jnp.isfinite(images).all():
            print("note: the images are not finite", file=sys.stderr)

    runs = [(number, chosen) for chosen in (few, many) for number in range(1, count + 1)]

    def compile_(run) -> float:
        number, chosen = run
        began = time.perf_counter()
        draw(number, number, **chosen | dict(timesteps=2))
        return time.perf_counter() - began

    with concurrent.futures.ThreadPoolExecutor(len(runs)) as pool:
        compiled = list(pool.map(compile_, runs))
    lines = [
        f"Hardware: {hardware()}; preset {preset}, {dtype.__name__}, one image at a time; "
        f"{size / 1e9:.2f} billion parameters; compiled side by side, "
        f"the longest in {max(compiled):.0f} s",
        "",
        "| pixels | steps, sampler | guidance | seconds an image | ms a step | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    runs = [(number, number, chosen) for number, chosen in runs]
    runs[count:count], runs[len(runs) :] = [(1, count, few)], [(1, count, many)]
    for first, last, chosen in runs:
        seconds = timed(lambda: draw(first, last, **chosen), warm=False)  # noqa: B023
        steps, scales = (chosen[name][first - 1 : last] for name in ("timesteps", "cond_scale"))
        what = "all" if last > first else config.image_sizes[last - 1]
        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use")
        lines.append(
            f"| {what} | {' + '.join(map(str, steps))}, "
            f"{chosen.get('sampler', 'ancestral')} | {', '.join(f'{s:g}' for s in scales)} | "
            f"{seconds:.3f} | {1e3 * seconds / sum(steps):.1f} | "
            f"{'not known' if peak is None else f'{peak / 1e9:.1f}'} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
