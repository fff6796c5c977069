"""What a cascade is, as frozen data: JSON in, JSON out, every mistake named at construction.

Field names and defaults are the arguments of imagen-pytorch 2.1.0: those of its `Imagen` here, of
its `Unet` in unet_config.py. So a user of it recognises everything, and a configuration converts
one to one. A field that the reference takes per U-Net (`timesteps`, ...) keeps the form it was
given in, one value or a tuple; `ImagenConfig.stage` resolves it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from imagen_jax.fields import Config
from imagen_jax.unet_config import NullUnetConfig, ResizeMode, UnetConfig

Schedule = Literal["cosine", "linear"]
Objective = Literal["noise", "v", "x_start"]
Real = int | float  # the reference's config class has whole numbers where both make sense
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
"""Width of the embeddings of the encoders that are known by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElucidatedConfig(Config):
    """Hyper-parameters of the reference's `ElucidatedImagen` (Karras et al., 2022).

    One value, or one per U-Net. They convert both ways; no loss or sampler uses them yet.
    """

    num_sample_steps: int | tuple[int, ...] = 32
    sigma_min: Real | tuple[Real, ...] = 0.002
    sigma_max: Real | tuple[Real, ...] = 80
    sigma_data: Real | tuple[Real, ...] = 0.5
    rho: Real | tuple[Real, ...] = 7
    P_mean: Real | tuple[Real, ...] = -1.2
    P_std: Real | tuple[Real, ...] = 1.2
    S_churn: Real | tuple[Real, ...] = 80
    S_tmin: Real | tuple[Real, ...] = 0.05
    S_tmax: Real | tuple[Real, ...] = 50
    S_noise: Real | tuple[Real, ...] = 1.003

    def __post_init__(self):
        self._check_types()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagenConfig(Config):
    """A cascade. Fields are those of the reference's `Imagen`, the video ones left out.

    `elucidated` is ours: the hyper-parameters of an `ElucidatedImagen`, None for an `Imagen`.
    The U-Nets are adapted as the reference does: the first has no low-resolution input, all
    others have one, and text width and channels are the cascade's. `unets` and `image_sizes` are
    tuples once constructed.
    """

    unets: UnetConfig | NullUnetConfig | tuple[UnetConfig | NullUnetConfig, ...]
    image_sizes: int | tuple[int, ...]
    text_encoder_name: str = "google/t5-v1_1-base"
    text_embed_dim: int | None = None
    channels: int = 3
    timesteps: int | tuple[int, ...] = 1000
    cond_drop_prob: float = 0.1
    loss_type: Literal["l1", "l2", "huber"] = "l2"
    noise_schedules: Schedule | tuple[Schedule, ...] = "cosine"
    pred_objectives: Objective | tuple[Objective, ...] = "noise"
    random_crop_sizes: int | None | tuple[int | None, ...] = None
    lowres_noise_schedule: Schedule = "linear"
    lowres_sample_noise_level: float = 0.2
    per_sample_random_aug_noise_level: bool = False
    condition_on_text: bool = True
    auto_normalize_img: bool = True
    dynamic_thresholding: bool | tuple[bool, ...] = True
    dynamic_thresholding_percentile: float = 0.95
    only_train_unet_number: int | None = None
    resize_mode: ResizeMode = "nearest"
    min_snr_loss_weight: bool | tuple[bool, ...] = True
    min_snr_gamma: float | tuple[float, ...] = 5.0
    elucidated: ElucidatedConfig | None = None

    def __post_init__(self):
        for name, one in (("unets", (UnetConfig, NullUnetConfig)), ("image_sizes", int)):
            if isinstance(getattr(self, name), one):
                object.__setattr__(self, name, (getattr(self, name),))
        self._check_types()
        self._check_stages()
        self._check_values()
        if self.text_embed_dim is None:
            object.__setattr__(self, "text_embed_dim", T5_WIDTHS.get(self.text_encoder_name))
        if self.condition_on_text and self.text_embed_dim is None:
            raise ValueError(
                f"text_embed_dim must be given: the width of text_encoder_name = "
                f"{self.text_encoder_name!r} is not known by name."
            )
        object.__setattr__(
            self, "unets", tuple(self._cast(i, unet) for i, unet in enumerate(self.unets))
        )
        for number, (unet, size) in enumerate(zip(self.unets, self.image_sizes, strict=True), 1):
            trained = self.stage(number).random_crop_size or size
            if isinstance(unet, UnetConfig) and trained % unet.downsampling:
                raise ValueError(
                    f"U-Net {number} halves the picture to 1/{unet.downsampling}; "
                    f"its size {trained} is no multiple of that."
                )

    def _check_stages(self) -> None:
        count = len(self.unets)
        if count == 0 or len(self.image_sizes) != count:
            raise ValueError(f"{count} unets and image_sizes = {self.image_sizes}: one size each.")
        for name in (
            "timesteps",
            "pred_objectives",
            "random_crop_sizes",
            "dynamic_thresholding",
            "min_snr_loss_weight",
            "min_snr_gamma",
        ):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != count:
                raise ValueError(f"{name} = {value} has {len(value)} entries for {count} unets.")
        schedules = self.noise_schedules
        if isinstance(schedules, tuple) and len(schedules) > count:
            raise ValueError(
                f"noise_schedules = {schedules} has {len(schedules)} entries for {count} unets."
            )
        if any(isinstance(unet, NullUnetConfig) for unet in self.unets[1:]):
            raise ValueError("a NullUnet can only be the first of the unets.")
        if self._per_stage("random_crop_sizes")[0] is not None:
            raise ValueError(
                f"random_crop_sizes = {self.random_crop_sizes}: the base is never cropped; "
                "its entry must be null, as in (null, 64)."
            )

    def _check_values(self) -> None:
        for name, lo, hi in (
            ("cond_drop_prob", 0.0, 1.0),
            ("lowres_sample_noise_level", 0.0, 1.0),
            ("dynamic_thresholding_percentile", 0.0, 1.0),
        ):
            if not lo <= getattr(self, name) <= hi:
                raise ValueError(f"{name} = {getattr(self, name)} must lie in [{lo}, {hi}].")
        if min(self._per_stage("timesteps")) < 1:
            raise ValueError(f"timesteps = {self.timesteps} must be positive.")
        number = self.only_train_unet_number
        if number is not None and not 1 <= number <= len(self.unets):
            raise ValueError(f"only_train_unet_number = {number} is none of 1 .. {len(self.unets)}")
        for crop, size in zip(self._per_stage("random_crop_sizes"), self.image_sizes, strict=True):
            if crop is not None and crop > size:
                raise ValueError(f"a crop of {crop} pixels does not fit a picture of {size}.")

    def _cast(self, index: int, unet: UnetConfig | NullUnetConfig) -> UnetConfig | NullUnetConfig:
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

    def _per_stage(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if name != "noise_schedules":
            return value if isinstance(value, tuple) else (value,) * len(self.unets)
        # The reference pads with 'cosine' to two and with 'linear' from there on.
        given = value if isinstance(value, tuple) else (value,)
        padded = given + ("cosine",) * (2 - len(given))
        return (padded + ("linear",) * len(self.unets))[: len(self.unets)]

    def stage(self, unet_number: int) -> "StageConfig":
        """Everything that training or sampling U-Net `unet_number` (from 1) needs to know."""
        if not 1 <= unet_number <= len(self.unets):
            raise ValueError(f"unet_number = {unet_number} is none of 1 .. {len(self.unets)}.")
        i = unet_number - 1
        gamma = self._per_stage("min_snr_gamma")[i]
        return StageConfig(
            unet_number=unet_number,
            unet=self.unets[i],
            image_size=self.image_sizes[i],
            previous_image_size=self.image_sizes[i - 1] if i else None,
            timesteps=self._per_stage("timesteps")[i],
            noise_schedule=self._per_stage("noise_schedules")[i],
            pred_objective=self._per_stage("pred_objectives")[i],
            random_crop_size=self._per_stage("random_crop_sizes")[i],
            dynamic_thresholding=self._per_stage("dynamic_thresholding")[i],
            min_snr_gamma=gamma if self._per_stage("min_snr_loss_weight")[i] else None,
        )

    @classmethod
    def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
        if "unets" in data:
            unets = data["unets"]
            unets = [unets] if isinstance(unets, Mapping) else unets
            data = {**data, "unets": tuple(_unet_from(unet) for unet in unets)}
        if isinstance(data.get("elucidated"), Mapping):
            data = {**data, "elucidated": ElucidatedConfig.from_dict(data["elucidated"])}
        return super().from_dict(data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of an `ImagenConfig`, its per-U-Net tuples resolved."""

    unet_number: int
    unet: UnetConfig | NullUnetConfig
    image_size: int
    previous_image_size: int | None
    timesteps: int
    noise_schedule: Schedule
    pred_objective: Objective
    random_crop_size: int | None
    dynamic_thresholding: bool
    min_snr_gamma: float | None


def _unet_from(data: Any) -> UnetConfig | NullUnetConfig:
    if not isinstance(data, Mapping):
        return data
    return (NullUnetConfig if "is_null" in data else UnetConfig).from_dict(data)
