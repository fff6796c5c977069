"""The network of FID against the same graph in torch, on random weights, in each file layout."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F
from PIL import Image

from imagen_jax.errors import UserError
from imagen_jax.metrics import inception
from imagen_jax.metrics.inception import load_inception, prepare


class Torch:
    """pytorch-fid's `fid_inception_v3`, as calls on a state dict that it draws as it goes."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.state: dict[str, torch.Tensor] = {}

    def draw(self, name: str, shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
        if name not in self.state:
            values = self.rng.uniform(low, high, shape).astype(np.float32)
            self.state[name] = torch.from_numpy(values)
        return self.state[name]

    def conv(self, x, name, width, kernel=1, stride=1, padding=0):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        size = (3 / (x.shape[1] * kernel[0] * kernel[1])) ** 0.5
        x = F.conv2d(
            x,
            self.draw(f"{name}.conv.weight", (width, x.shape[1], *kernel), -size, size),
            stride=stride,
            padding=padding,
        )
        gain = self.draw(f"{name}.bn.weight", (width,), 0.8, 1.2)
        bias = self.draw(f"{name}.bn.bias", (width,), -0.2, 0.4)
        mean = self.draw(f"{name}.bn.running_mean", (width,), -0.2, 0.2)
        var = self.draw(f"{name}.bn.running_var", (width,), 0.2, 0.6)
        return F.relu(F.batch_norm(x, mean, var, gain, bias, eps=1e-3))

    def average(self, x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def a(self, x, name, pooled):
        one = self.conv(x, f"{name}.branch1x1", 64)
        five = self.conv(
            self.conv(x, f"{name}.branch5x5_1", 48), f"{name}.branch5x5_2", 64, 5, 1, 2
        )
        three = self.conv(x, f"{name}.branch3x3dbl_1", 64)
        three = self.conv(three, f"{name}.branch3x3dbl_2", 96, 3, 1, 1)
        three = self.conv(three, f"{name}.branch3x3dbl_3", 96, 3, 1, 1)
        return torch.cat(
            [one, five, three, self.conv(self.average(x), f"{name}.branch_pool", pooled)], 1
        )

    def c(self, x, name, width):
        row, column = dict(kernel=(1, 7), padding=(0, 3)), dict(kernel=(7, 1), padding=(3, 0))
        seven = self.conv(x, f"{name}.branch7x7_1", width)
        seven = self.conv(seven, f"{name}.branch7x7_2", width, **row)
        seven = self.conv(seven, f"{name}.branch7x7_3", 192, **column)
        twice = self.conv(x, f"{name}.branch7x7dbl_1", width)
        for number, where in ((2, column), (3, row), (4, column)):
            twice = self.conv(twice, f"{name}.branch7x7dbl_{number}", width, **where)
        twice = self.conv(twice, f"{name}.branch7x7dbl_5", 192, **row)
        one = self.conv(x, f"{name}.branch1x1", 192)
        pool = self.conv(self.average(x), f"{name}.branch_pool", 192)
        return torch.cat([one, seven, twice, pool], 1)

    def split(self, x, name, number):
        return [
            self.conv(x, f"{name}_{number}a", 384, (1, 3), 1, (0, 1)),
            self.conv(x, f"{name}_{number}b", 384, (3, 1), 1, (1, 0)),
        ]

    def e(self, x, name, pooled):
        three = self.conv(x, f"{name}.branch3x3_1", 384)
        twice = self.conv(x, f"{name}.branch3x3dbl_1", 448)
        twice = self.conv(twice, f"{name}.branch3x3dbl_2", 384, 3, 1, 1)
        branches = [self.conv(x, f"{name}.branch1x1", 320)]
        branches += self.split(three, f"{name}.branch3x3", 2)
        branches += self.split(twice, f"{name}.branch3x3dbl", 3)
        return torch.cat([*branches, self.conv(pooled, f"{name}.branch_pool", 192)], 1)

    def __call__(self, x):
        x = self.conv(x, "Conv2d_1a_3x3", 32, 3, 2)
        x = self.conv(x, "Conv2d_2a_3x3", 32, 3)
        x = F.max_pool2d(self.conv(x, "Conv2d_2b_3x3", 64, 3, 1, 1), 3, 2)
        x = self.conv(self.conv(x, "Conv2d_3b_1x1", 80), "Conv2d_4a_3x3", 192, 3)
        x = F.max_pool2d(x, 3, 2)
        for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = self.a(x, f"Mixed_{name}", pooled)
        twice = self.conv(x, "Mixed_6a.branch3x3dbl_1", 64)
        twice = self.conv(twice, "Mixed_6a.branch3x3dbl_2", 96, 3, 1, 1)
        twice = self.conv(twice, "Mixed_6a.branch3x3dbl_3", 96, 3, 2)
        three = self.conv(x, "Mixed_6a.branch3x3", 384, 3, 2)
        x = torch.cat([three, twice, F.max_pool2d(x, 3, 2)], 1)
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = self.c(x, f"Mixed_{name}", width)
        three = self.conv(x, "Mixed_7a.branch3x3_1", 192)
        three = self.conv(three, "Mixed_7a.branch3x3_2", 320, 3, 2)
        seven = self.conv(x, "Mixed_7a.branch7x7x3_1", 192)
        seven = self.conv(seven, "Mixed_7a.branch7x7x3_2", 192, (1, 7), 1, (0, 3))
        seven = self.conv(seven, "Mixed_7a.branch7x7x3_3", 192, (7, 1), 1, (3, 0))
        seven = self.conv(seven, "Mixed_7a.branch7x7x3_4", 192, 3, 2)
        x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
        x = self.e(x, "Mixed_7b", self.average(x))
        return self.e(x, "Mixed_7c", F.max_pool2d(x, 3, 1, 1)).mean((2, 3))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Scaled images, torch's features of them, and the .pth of its weights."""
    x = np.random.default_rng(1).uniform(-1, 1, (2, 299, 299, 3)).astype(np.float32)
    network = Torch()
    with torch.no_grad():
        features = network(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(network.state | {"fc.weight": torch.zeros(1008, 2048)}, path)
    return x, features, path


def test_features_are_torchs(case):
    x, features, path = case
    found = np.asarray(load_inception(path)(jnp.asarray(x)))
    assert found.shape == (2, inception.FEATURES) and np.std(features) > 0.1
    np.testing.assert_allclose(found, features, atol=1e-4 * np.abs(features).max())


def nested(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module whose buffers have these names."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_buffer(last, tensor)
    return root


def test_every_layout_gives_the_same_network(case, tmp_path):
    """The TensorFlow graph's names, gains folded away, in TorchScript and in safetensors."""
    network = load_inception(case[2])
    graph = {}
    for name, conv in network.convs.items():
        kernel = np.asarray(conv.kernel[...])
        one = np.ones(kernel.shape[-1], np.float32)
        graph[f"net.layers.{name}.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        graph[f"net.layers.{name}.beta"] = np.asarray(conv.bias[...])
        graph[f"net.layers.{name}.mean"] = 0 * one
        graph[f"net.layers.{name}.var"] = one - np.float32(inception.EPSILON)
    safetensors.numpy.save_file(graph, tmp_path / "a.safetensors")
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        script = torch.jit.script(nested({k: torch.tensor(v) for k, v in graph.items()}))
    script.save(str(tmp_path / "a.pt"))
    for file in ("a.safetensors", "a.pt"):
        again = load_inception(tmp_path / file)
        for name, conv in network.convs.items():
            for part in ("kernel", "bias"):
                one, two = (getattr(c, part)[...] for c in (conv, again.convs[name]))
                np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)


def test_other_files_are_refused(case, tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"is not FID's Inception network: conv \(missing"):
        load_inception(tmp_path / "a.safetensors")
    (tmp_path / "b.pt").write_text("nothing")
    with pytest.raises(UserError, match="is not a TorchScript file"):
        load_inception(tmp_path / "b.pt")
    with pytest.raises(UserError, match="c.pt: no such file"):
        load_inception(tmp_path / "c.pt")


def test_images_are_prepared_as_clean_fid_and_pytorch_fid_do():
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    clean, legacy = prepare(images), prepare(images, "legacy")
    assert clean.shape == legacy.shape == (2, 299, 299, 3)
    channel = Image.fromarray(images[1, ..., 2].astype(np.float32), mode="F")
    expected = np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(clean[1, ..., 2] * 128 + 128, expected, atol=1e-3)
    x = torch.from_numpy(np.moveaxis(images, -1, 1) / 255).float()
    expected = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
    np.testing.assert_allclose(legacy, np.moveaxis(expected.numpy(), 1, -1), atol=1e-5)
