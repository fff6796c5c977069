"""The configuration of a cascade: frozen, convertible to and from JSON, checked at construction.

Field names and defaults are the arguments of imagen-pytorch 2.1.0: those of its `Imagen` here, of
its `Unet` in unet_config.py, of its `ElucidatedImagen` in diffusion_config.py. Its users recognise
everything, and configurations convert one to one. A field that the reference takes per U-Net
(`timesteps`, ...) keeps the form in which it was given, one value or a tuple; `ImagenConfig.stage`
resolves it.

Sizes are always (height, width); one integer means a square.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from imagen_jax.diffusion.edm import RawTimeVP
from imagen_jax.diffusion.losses import Loss, Objective
from imagen_jax.diffusion.process import Process
from imagen_jax.diffusion.samplers import Options
from imagen_jax.diffusion.schedules import Schedule
from imagen_jax.diffusion.vp import VP
from imagen_jax.diffusion_config import DiscreteConfig, ElucidatedConfig, of_stage
from imagen_jax.errors import UserError
from imagen_jax.fields import Config
from imagen_jax.if_config import IFUnetConfig
from imagen_jax.stage import LowRes, SamplingDefaults, Stage, show
from imagen_jax.types import Size, pair
from imagen_jax.unet_config import NullUnetConfig, ResizeMode, UnetConfig

AnyUnet = UnetConfig | IFUnetConfig | NullUnetConfig

T = TypeVar("T")

T5_WIDTHS = {
    "demo": 128,
    "google/t5-v1_1-small": 512,
    "google/t5-v1_1-base": 768,
    "google/t5-v1_1-large": 1024,
    "google/t5-v1_1-xl": 2048,
    "google/t5-v1_1-xxl": 4096,
    "t5-small": 512,
    "t5-base": 768,
    "t5-large": 1024,
    "t5-3b": 1024,
    "t5-11b": 1024,
}
"""Name of a known text encoder -> the width of its embeddings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagenConfig(Config):
    """A cascade. Fields are those of the reference's `Imagen`, without the video ones.

    `elucidated` and `discrete` are added: the hyper-parameters of an `ElucidatedImagen`, or of
    discrete steps; None for an `Imagen`. `lowres_noise_range` is added too: the range that the
    times of the low-resolution image's noise are drawn from in training. The full range, as in the
    reference, spends half of the training on images in which the stage cannot see what it should
    upsample. `lowres_sample_noise_level` may be one per U-Net.
    The U-Nets are adapted as in the reference: the first has no low-resolution input, all others
    have one, and all get the cascade's text width and channels. After construction, `unets` and
    `image_sizes` are tuples. Each U-Net's size is an integer or (h, w), all of one aspect ratio.
    """

    unets: AnyUnet | tuple[AnyUnet, ...]
    image_sizes: int | Size | tuple[int | Size, ...]
    text_encoder_name: str = "google/t5-v1_1-base"
    text_embed_dim: int | None = None
    channels: int = 3
    timesteps: int | tuple[int, ...] = 1000
    cond_drop_prob: float = 0.1
    loss_type: Loss = "l2"
    noise_schedules: Schedule | tuple[Schedule, ...] = "cosine"
    pred_objectives: Objective | tuple[Objective, ...] = "noise"
    random_crop_sizes: int | None | tuple[int | Size | None, ...] = None
    lowres_noise_schedule: Schedule = "linear"
    lowres_sample_noise_level: float | tuple[float, ...] = 0.2
    per_sample_random_aug_noise_level: bool = False
    lowres_noise_range: tuple[float, float] | tuple[tuple[float, float], ...] = (0.0, 1.0)
    condition_on_text: bool = True
    auto_normalize_img: bool = True
    dynamic_thresholding: bool | tuple[bool, ...] = True
    dynamic_thresholding_percentile: float = 0.95
    only_train_unet_number: int | None = None
    resize_mode: ResizeMode = "nearest"
    min_snr_loss_weight: bool | tuple[bool, ...] = True
    min_snr_gamma: float | tuple[float, ...] = 5.0
    elucidated: ElucidatedConfig | None = None
    discrete: DiscreteConfig | None = None

    def __post_init__(self):
        if isinstance(self.unets, AnyUnet):
            object.__setattr__(self, "unets", (self.unets,))
        self._check_types()
        object.__setattr__(self, "image_sizes", _sizes(self.image_sizes, len(self.unets)))
        self._check_stages()
        self._check_values()
        if self.text_embed_dim is None:
            object.__setattr__(self, "text_embed_dim", T5_WIDTHS.get(self.text_encoder_name))
        if self.condition_on_text and self.text_embed_dim is None:
            raise UserError(
                f"text_embed_dim must be given: the width of text_encoder_name = "
                f"{self.text_encoder_name!r} is not known by name."
            )
        object.__setattr__(
            self, "unets", tuple(self._cast(i, unet) for i, unet in enumerate(self.unets))
        )
        self._check_sizes()

    def _check_stages(self) -> None:
        count = len(self.unets)
        if count == 0 or len(self.image_sizes) != count:
            raise UserError(
                f"image_sizes = {self.image_sizes}: give one size for each of {count} unets."
            )
        for name in (
            "timesteps",
            "pred_objectives",
            "random_crop_sizes",
            "dynamic_thresholding",
            "min_snr_loss_weight",
            "min_snr_gamma",
            "lowres_sample_noise_level",
        ):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != count:
                raise UserError(f"{name} = {value} has {len(value)} entries for {count} unets.")
        if self.elucidated is not None and self.discrete is not None:
            raise UserError("elucidated and discrete are two kinds of diffusion: give one of them.")
        for kind in ("elucidated", "discrete"):
            part = getattr(self, kind)
            for name, value in () if part is None else vars(part).items():
                if isinstance(value, tuple) and len(value) != count:
                    raise UserError(
                        f"{kind}.{name} = {value} has {len(value)} entries for {count} unets."
                    )
        schedules = self.noise_schedules
        if isinstance(schedules, tuple) and len(schedules) > count:
            raise UserError(
                f"noise_schedules = {schedules} has {len(schedules)} entries for {count} unets."
            )
        if len(self._noise_ranges()) != count:
            raise UserError(
                f"lowres_noise_range = {self.lowres_noise_range}: give one range, or one for each "
                f"of {count} unets."
            )
        if self.discrete is None and any(getattr(u, "learned_variance", False) for u in self.unets):
            raise UserError("learned_variance needs diffusion in discrete steps: give discrete.")
        if any(isinstance(unet, NullUnetConfig) for unet in self.unets[1:]):
            raise UserError("a NullUnet can only be the first of the unets.")
        if self.per_stage("random_crop_sizes")[0] is not None:
            raise UserError(
                f"random_crop_sizes[0] must be None, got {self.random_crop_sizes}: the base U-Net "
                "is trained on complete images. For example (None, 64), in JSON [null, 64]."
            )

    def _check_values(self) -> None:
        for name, lo, hi in (
            ("cond_drop_prob", 0.0, 1.0),
            ("dynamic_thresholding_percentile", 0.0, 1.0),
        ):
            if not lo <= getattr(self, name) <= hi:
                raise UserError(f"{name} = {getattr(self, name)} must lie in [{lo}, {hi}].")
        if not all(0 <= level <= 1 for level in self.per_stage("lowres_sample_noise_level")):
            level = self.lowres_sample_noise_level
            raise UserError(f"lowres_sample_noise_level = {level} must lie in [0.0, 1.0].")
        if not all(0 <= low <= high <= 1 for low, high in self._noise_ranges()):
            raise UserError(
                f"lowres_noise_range = {self.lowres_noise_range} must be increasing, within [0, 1]."
            )
        if self.elucidated is not None:
            for i in range(len(self.unets)):
                self._process(i).grid(1)  # rejects an empty range of noise
        if min(self.per_stage("timesteps")) < 1:
            raise UserError(f"timesteps = {self.timesteps} must be positive.")
        number = self.only_train_unet_number
        if number is not None and not 1 <= number <= len(self.unets):
            raise UserError(f"only_train_unet_number = {number} is not in 1 .. {len(self.unets)}.")

    def _check_sizes(self) -> None:
        sizes = [pair(size) for size in self.image_sizes]
        crops = self.per_stage("random_crop_sizes")
        for number, (unet, size, crop) in enumerate(zip(self.unets, sizes, crops, strict=True), 1):
            trained = size if crop is None else pair(crop)
            if min(trained) < 1:
                raise UserError(f"U-Net {number}: the size {show(trained)} must be positive.")
            if trained[0] > size[0] or trained[1] > size[1]:
                raise UserError(
                    f"U-Net {number}: crops of {show(trained)} pixels are larger than its images, "
                    f"{show(size)}."
                )
            if size[0] * sizes[0][1] != size[1] * sizes[0][0]:
                raise UserError(
                    f"image_sizes = {self.image_sizes}: all stages must have the same aspect "
                    f"ratio; {show(size)} is not a multiple of {show(sizes[0])}."
                )
            if not isinstance(unet, NullUnetConfig) and any(n % unet.downsampling for n in trained):
                raise UserError(
                    f"U-Net {number} downsamples by {unet.downsampling}; "
                    f"its size {show(trained)} is not a multiple of that."
                )

    def _cast(self, index: int, unet: AnyUnet) -> AnyUnet:
        if isinstance(unet, NullUnetConfig):
            return unet
        return dataclasses.replace(
            unet,
            lowres_cond=index > 0,
            cond_on_text=self.condition_on_text,
            text_embed_dim=self.text_embed_dim if self.condition_on_text else None,
            channels=self.channels,
            channels_out=self.channels,
        )

    def per_stage(self, name: str) -> tuple[Any, ...]:
        """The field `name` as a tuple with one entry per U-Net."""
        value = getattr(self, name)
        if name != "noise_schedules":
            return value if isinstance(value, tuple) else (value,) * len(self.unets)
        # The reference pads with 'cosine' up to two entries, and with 'linear' after that.
        given = value if isinstance(value, tuple) else (value,)
        padded = given + ("cosine",) * (2 - len(given))
        return (padded + ("linear",) * len(self.unets))[: len(self.unets)]

    def stage(self, unet_number: int) -> Stage:
        """All static data that training or sampling U-Net `unet_number` (from 1) depends on."""
        i = self._index(unet_number)
        crop = self.per_stage("random_crop_sizes")[i]
        return Stage(
            unet_number=unet_number,
            network=self.unets[i],
            process=self._process(i),
            size=pair(self.image_sizes[i]),
            channels=self.channels,
            lowres=self._lowres(i),
            crop=None if crop is None else pair(crop),
            condition_on_text=self.condition_on_text,
            cond_drop_prob=self.cond_drop_prob,
            auto_normalize_img=self.auto_normalize_img,
            resize_mode=self.resize_mode,
            dynamic_thresholding=self.per_stage("dynamic_thresholding")[i],
        )

    def with_size(self, unet_number: int, size: Size) -> "ImagenConfig":
        """The cascade with images of `size` (height, width) at one stage, and in proportion at the
        others. Raises UserError if sizes are then not integers, or do not fit a U-Net."""
        own = pair(self.image_sizes[self._index(unet_number)])
        if size == own:
            return self
        sizes = []
        for one in map(pair, self.image_sizes):
            sides = [side * new / old for side, new, old in zip(one, size, own, strict=True)]
            if any(side % 1 for side in sides):
                raise UserError(
                    f"images of {size[0]}x{size[1]} at U-Net {unet_number} would be "
                    f"{sides[0]:g}x{sides[1]:g} at another: sizes must be integers."
                )
            sizes.append((int(sides[0]), int(sides[1])))
        return dataclasses.replace(self, image_sizes=tuple(sizes))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the cascade."""
        return tuple(self.stage(number) for number in range(1, len(self.unets) + 1))

    @property
    def text_len(self) -> int:
        """The number of a caption's tokens that at least one U-Net reads; the rest are cut off."""
        lengths = [unet.text_len for unet in self.unets if not isinstance(unet, NullUnetConfig)]
        return max(lengths, default=0)

    @property
    def reads_padding(self) -> bool:
        """Whether a U-Net attends to all positions of a text, including padding."""
        return any(isinstance(unet, IFUnetConfig) for unet in self.unets)

    @property
    def encodes_blank_text(self) -> bool:
        """Whether a dropped text is replaced by the empty text's embedding."""
        return any(getattr(unet, "null_text", None) == "encoded" for unet in self.unets)

    def sampling_defaults(self, unet_number: int) -> SamplingDefaults:
        """The default numbers for sampling U-Net `unet_number` (from 1)."""
        i, own = self._index(unet_number), self.elucidated
        steps, options = self.per_stage("timesteps")[i], Options()
        if own is not None:
            steps, options = of_stage(own.num_sample_steps, i), own.options(i)
        most = float("inf")
        if self.discrete is not None:
            most = float(of_stage(self.discrete.sample_max_value, i))
        return SamplingDefaults(
            num_steps=steps,
            percentile=self.dynamic_thresholding_percentile,
            most=most,
            lowres_noise_level=self.per_stage("lowres_sample_noise_level")[i],
            options=options,
        )

    def _noise_ranges(self) -> tuple[tuple[float, float], ...]:
        given = self.lowres_noise_range
        return given if isinstance(given[0], tuple) else (given,) * len(self.unets)

    def _index(self, unet_number: int) -> int:
        if not 1 <= unet_number <= len(self.unets):
            raise UserError(f"unet_number = {unet_number} is not in 1 .. {len(self.unets)}.")
        return unet_number - 1

    def _process(self, i: int) -> Process:
        if self.elucidated is not None:
            return self.elucidated.process(i)
        if self.discrete is not None:
            learned = getattr(self.unets[i], "learned_variance", False)
            return self.discrete.process(i, learned_variance=learned, loss_type=self.loss_type)
        gamma = self.per_stage("min_snr_gamma")[i]
        return VP(
            schedule=self.per_stage("noise_schedules")[i],
            objective=self.per_stage("pred_objectives")[i],
            loss_type=self.loss_type,
            min_snr_gamma=gamma if self.per_stage("min_snr_loss_weight")[i] else None,
        )

    def _lowres(self, i: int) -> LowRes | None:
        if i == 0:
            return None
        process = VP(schedule=self.lowres_noise_schedule)
        if self.discrete is not None:
            process = self.discrete.process(0)
        raw = self.elucidated is not None and self.elucidated.lowres_conditioning == "time"
        return LowRes(
            size=pair(self.image_sizes[i - 1]),
            process=process,
            sampling_process=RawTimeVP(schedule=process.schedule) if raw else process,
            per_sample=self.per_sample_random_aug_noise_level,
            noise_range=self._noise_ranges()[i],
        )

    @classmethod
    def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
        if not isinstance(data, Mapping):
            return super().from_dict(data)
        if "unets" in data:
            unets = data["unets"]
            if isinstance(unets, Mapping):
                unets = [unets]
            if isinstance(unets, (list, tuple)):
                unets = tuple(_unet_from(unet) for unet in unets)
            data = {**data, "unets": unets}
        if isinstance(data.get("elucidated"), Mapping):
            data = {**data, "elucidated": ElucidatedConfig.from_dict(data["elucidated"])}
        if isinstance(data.get("discrete"), Mapping):
            data = {**data, "discrete": DiscreteConfig.from_dict(data["discrete"])}
        return super().from_dict(data)


def _sizes(sizes: int | Size | tuple[int | Size, ...], count: int) -> tuple[int | Size, ...]:
    """One entry per U-Net, a square as an integer. A single U-Net also accepts a bare (h, w)."""
    if isinstance(sizes, int):
        sizes = (sizes,)
    if count == 1 and len(sizes) == 2 and all(isinstance(side, int) for side in sizes):
        sizes = (sizes,)
    return tuple(s if isinstance(s, int) or s[0] != s[1] else s[0] for s in sizes)


def _unet_from(data: Any) -> AnyUnet:
    """The configuration of a U-Net; its kind is recognised by a field that no other kind has."""
    if not isinstance(data, Mapping):
        return data
    kinds = {"is_null": NullUnetConfig, "pool_heads": IFUnetConfig}
    kind = next((kinds[name] for name in kinds if name in data), UnetConfig)
    return kind.from_dict(data)
