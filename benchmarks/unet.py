"""One training step and one sample of the same U-Net, here and in imagen-pytorch.

    python -m benchmarks.unet                    # the two in turn, medians and ratios
    python -m benchmarks.unet --rounds 5 --out unet.json
    python -m benchmarks.unet --model base --rounds 1    # a GPU: the paper's base, 1.6 billion

The sides take turns, each in its own process, because both keep their threads spinning. Within a
process, compilation and warm-up come first and are reported separately. On a GPU both compute in
bfloat16, and the original also runs under `torch.compile`. Needs what `make test` installs.
"""

import argparse
import dataclasses
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import commands
from imagen_jax import UnetConfig
from imagen_jax.presets import BaseUnet64

UNET = dict(
    dim=64,
    cond_dim=128,
    dim_mults=(1, 2, 4),
    num_resnet_blocks=1,
    layer_attns=(False, True, True),
    layer_cross_attns=(False, True, True),
    text_embed_dim=512,
    max_text_len=32,
)
SIZE, COND_SCALE = 32, 3.0


@dataclasses.dataclass(frozen=True)
class Model:
    config: UnetConfig
    size: int
    train_batch: int
    sample_batch: int
    steps: int

    @property
    def imagen(self) -> dict:
        """Arguments of either project's cascade."""
        width = self.config.text_embed_dim
        return dict(image_sizes=self.size, text_embed_dim=width, timesteps=self.steps)

    @property
    def text_shape(self) -> tuple[int, int, int]:
        return self.train_batch, self.config.max_text_len, self.config.text_embed_dim


MODELS = {
    "small": Model(UnetConfig(**UNET), SIZE, train_batch=8, sample_batch=4, steps=50),
    "base": Model(BaseUnet64(text_embed_dim=1024), 64, train_batch=16, sample_batch=1, steps=20),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--rounds", type=int, default=3, help="processes per side")
    parser.add_argument("--out", type=Path, help="write the measurements as JSON")
    parser.add_argument("--side", choices=SIDES, help="measure only this side, in this process")
    args = parser.parse_args()
    if args.side:
        commands.keep_memory()  # for both sides alike
        print(json.dumps(SIDES[args.side](MODELS[args.model])))
        return
    sides = ["jax", "torch"] + (["torch-compile"] if _has_gpu() else [])
    runs = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in sides:
            print(f"round {number + 1} of {args.rounds}: {side}", file=sys.stderr)
            runs[side].append(_measure(side, args.model))
    print(_table(runs))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(dict(hardware=hardware(), runs=runs), indent=1) + "\n")


def run_jax(model: Model) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import imagen_jax
    from imagen_jax import nn
    from train.optimizer import make_optimizer
    from train.settings import Optimization, Settings
    from train.state import TrainState
    from train.step import make_train_step

    config = imagen_jax.ImagenConfig(unets=model.config, **model.imagen)
    settings = Settings(batch_size=model.train_batch, max_grad_norm=None)
    unet, rng = config.unets[0], np.random.default_rng(0)
    params = nn.init_fn(unet)(jax.random.key(0))
    imagen = imagen_jax.Imagen(
        config, unets=[nn.bind(unet, jax.tree.map(jnp.copy, params), dtype=settings.compute_dtype)]
    )
    texts = jnp.asarray(rng.standard_normal(model.text_shape, np.float32))
    images = rng.random((model.train_batch, model.size, model.size, 3), np.float32)
    batch = dict(
        images=jnp.asarray(images),
        text_embeds=texts,
        text_masks=jnp.ones(model.text_shape[:2], bool),
    )
    step, key = make_train_step(config.stage(1), settings.section(Optimization)), jax.random.key(0)
    state = TrainState.create(params, make_optimizer(settings))

    def train():
        nonlocal state
        state, metrics = step(state, batch, key)
        return jax.block_until_ready(metrics)

    def sample(cond_scale):
        return lambda: jax.block_until_ready(
            imagen.sample(text_embeds=texts[: model.sample_batch], cond_scale=cond_scale, key=key)
        )

    return _measured(train, sample)


def run_torch(model: Model, *, compiled: bool = False) -> dict[str, float]:
    import contextlib

    from imagen_jax.interop.reference import build_unet, import_imagen_pytorch

    original = import_imagen_pytorch()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        unet = build_unet(model.config)
    imagen = original.Imagen(unet, **model.imagen).to(device)
    if compiled:
        imagen.unets[0].forward = torch.compile(imagen.unets[0].forward)
    optimizer = torch.optim.Adam(imagen.parameters(), 1e-4, betas=(0.9, 0.99))
    images = torch.rand(model.train_batch, 3, model.size, model.size, device=device)
    texts = torch.randn(*model.text_shape, device=device)

    def half():
        return (
            torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()
        )

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def train():
        with half():
            loss = imagen(images, text_embeds=texts, unet_number=1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()

    def sample(cond_scale):
        def run():
            with half():
                imagen.sample(
                    text_embeds=texts[: model.sample_batch], cond_scale=cond_scale, use_tqdm=False
                )
            wait()

        return run

    return _measured(train, sample)


SIDES = {
    "jax": run_jax,
    "torch": run_torch,
    "torch-compile": functools.partial(run_torch, compiled=True),
}


def _measured(train: Callable[[], object], sample: Callable[[float], Callable]) -> dict[str, float]:
    """Seconds: the first call of each, compilation included, and the median of those after."""
    return {
        **_timed("training step", train, 10),
        **_timed("guided sample", sample(COND_SCALE), 2),
        **_timed("unguided sample", sample(1.0), 2),
    }


def _timed(name: str, run: Callable[[], object], times: int) -> dict[str, float]:
    began = time.perf_counter()
    run()
    first = time.perf_counter() - began
    run()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return {name: statistics.median(seconds), f"first {name}": first}


def _measure(side: str, model: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.unet", "--model", model, "--side", side]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _table(runs: dict[str, list[dict[str, float]]]) -> str:
    """Medians over the rounds; the ratio is of the rounds' pairs, above 1 where ours is faster."""
    lines = [
        f"Hardware: {hardware()}",
        "",
        "| seconds | "
        + " | ".join(runs)
        + " | times faster than "
        + ", ".join(list(runs)[1:])
        + " |",
        "|---" * (len(runs) + 2) + "|",
    ]
    for name in runs["jax"][0]:
        medians = [statistics.median(run[name] for run in side) for side in runs.values()]
        cells = [f"{median:.3f}" for median in medians]
        ratios = [
            statistics.median(b[name] / a[name] for a, b in zip(runs["jax"], other, strict=True))
            for side, other in runs.items()
            if side != "jax"
        ]
        cells.append(", ".join(f"{ratio:.2f}" for ratio in ratios))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _has_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def hardware() -> str:
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    name = names[0].split(":")[1].strip() if names else platform.processor()
    import os

    return f"{name}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    main()
