"""Networks on images and points, tiny, in Flax Linen."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import classifier, cross_entropy, linen, normal, regression, rows
from flax import linen as nn


class _EncoderBlock(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class _ViT(nn.Module):
    width: int
    depth: int
    heads: int
    patch: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (self.patch, self.patch), (self.patch, self.patch))(x)
        x = x.reshape(-1, self.width)
        token = self.param("cls", nn.initializers.normal(0.02), (1, self.width))
        x = jnp.concatenate([token, x])
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape)
        for _ in range(self.depth):
            x = _EncoderBlock(self.heads)(x)
        return nn.Dense(3)(nn.LayerNorm()(x)[0])


def vit(n=4, width=8, depth=2, heads=2, image=8, patch=4):
    """An image is worth 16x16 words (arXiv:2010.11929)."""
    return classifier(_ViT(width, depth, heads, patch), normal(n, image, image, 3))


class _Mixer(nn.Module):
    width: int
    depth: int

    @nn.compact
    def __call__(self, x):
        mlp = lambda x: nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(2 * x.shape[-1])(x)))  # noqa: E731
        x = nn.Conv(self.width, (4, 4), (4, 4))(x).reshape(-1, self.width)
        for _ in range(self.depth):
            x = x + mlp(nn.LayerNorm()(x).T).T
            x = x + mlp(nn.LayerNorm()(x))
        return nn.Dense(3)(x.mean(0))


def mixer(n=4, width=8, depth=2, image=8):
    """MLP-Mixer (arXiv:2105.01601)."""
    return classifier(_Mixer(width, depth), normal(n, image, image, 3))


class _ConvNeXt(nn.Module):
    width: int
    depth: int

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(self.width, (2, 2), (2, 2))(x))
        for index in range(self.depth):
            y = nn.Conv(self.width, (7, 7), feature_group_count=self.width)(x)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(y)))
            scale = self.param(f"scale_{index}", nn.initializers.constant(1e-6), (self.width,))
            x = x + scale * nn.Dense(self.width)(y)
        return nn.Dense(3)(nn.LayerNorm()(x.mean((0, 1))))


def convnext(n=4, width=8, depth=2, image=8):
    """A ConvNet for the 2020s (arXiv:2201.03545)."""
    return classifier(_ConvNeXt(width, depth), normal(n, image, image, 3))


class _StandardizedConv(nn.Module):
    """Weight standardization (arXiv:1903.10520)."""

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.features)
        w = self.param("kernel", nn.initializers.lecun_normal(), shape)
        w = (w - w.mean((0, 1, 2))) / jnp.sqrt(w.var((0, 1, 2)) + 1e-5)
        steps = (self.strides, self.strides)
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x[None], w, steps, "SAME", dimension_numbers=dims)[0]


class _ResNet(nn.Module):
    width: int
    depth: int

    @nn.compact
    def __call__(self, x):
        x = _StandardizedConv(self.width)(x)
        for index in range(self.depth):
            width = self.width * 2**index
            y = nn.relu(nn.GroupNorm(4)(x))
            skip = nn.Conv(width, (1, 1), (2, 2), use_bias=False)(y)
            y = nn.relu(nn.GroupNorm(4)(_StandardizedConv(width, 2)(y)))
            x = skip + _StandardizedConv(width)(y)
        return nn.Dense(3)(nn.relu(nn.GroupNorm(4)(x)).mean((0, 1)))


def resnet(n=4, width=8, depth=2, image=8):
    """A pre-activation ResNet with GroupNorm and weight standardization (arXiv:1912.11370)."""
    return classifier(_ResNet(width, depth), normal(n, image, image, 3))


class _WideResNet(nn.Module):
    width: int
    depth: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        for _ in range(self.depth):
            y = nn.Conv(self.width, (3, 3), use_bias=False)(nn.relu(nn.GroupNorm(4)(x)))
            x = x + nn.Conv(self.width, (3, 3), use_bias=False)(nn.relu(nn.GroupNorm(4)(y)))
        x = nn.avg_pool(nn.relu(nn.GroupNorm(4)(x)), (4, 4), (4, 4))
        return nn.Dense(3)(x.reshape(-1))


def wide_resnet(n=4, width=8, depth=1, image=8):
    """Wide residual networks (arXiv:1605.07146)."""
    return classifier(_WideResNet(width, depth), normal(n, image, image, 3))


class _DenseNet(nn.Module):
    growth: int
    depth: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            y = nn.relu(nn.GroupNorm(1)(x))
            x = jnp.concatenate([x, nn.Conv(self.growth, (3, 3))(y)], -1)
        x = nn.avg_pool(nn.Conv(self.growth, (1, 1))(x), (2, 2), (2, 2))
        return nn.Dense(3)(x.mean((0, 1)))


def densenet(n=4, growth=4, depth=3, image=8):
    """Densely connected convolutions (arXiv:1608.06993)."""
    return classifier(_DenseNet(growth, depth), normal(n, image, image, 3))


class _SqueezeExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate = nn.relu(nn.Dense(max(2, x.shape[-1] // 4))(x.mean((0, 1))))
        return x * nn.sigmoid(nn.Dense(x.shape[-1])(gate))


class _EfficientNet(nn.Module):
    width: int
    depth: int

    @nn.compact
    def __call__(self, x):
        x = nn.swish(nn.GroupNorm(4)(nn.Conv(self.width, (3, 3), (2, 2), use_bias=False)(x)))
        for _ in range(self.depth):
            hidden = 2 * self.width
            y = nn.swish(nn.GroupNorm(4)(nn.Conv(hidden, (1, 1), use_bias=False)(x)))
            y = nn.Conv(hidden, (3, 3), feature_group_count=hidden, use_bias=False)(y)
            y = _SqueezeExcite()(nn.swish(nn.GroupNorm(4)(y)))
            x = x + nn.GroupNorm(4)(nn.Conv(self.width, (1, 1), use_bias=False)(y))
        return nn.Dense(3)(x.mean((0, 1)))


def efficientnet(n=4, width=8, depth=2, image=8):
    """Inverted bottlenecks with depthwise convolutions (arXiv:1905.11946)."""
    return classifier(_EfficientNet(width, depth), normal(n, image, image, 3))


class _SENet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(x + _SqueezeExcite()(nn.Conv(8, (3, 3), feature_group_count=2)(x)))
        return nn.Dense(3)(nn.max_pool(x, (2, 2), (2, 2)).mean((0, 1)))


def senet(n=4):
    """Squeeze-and-excitation (arXiv:1709.01507) on grouped convolutions."""
    return classifier(_SENet(), normal(n, 6, 6, 3))


def _time_embedding(time, width):
    """Sines and cosines of one time at several frequencies, `[width]`."""
    angles = time * jnp.exp(-jnp.log(1e4) * jnp.arange(width // 2) / (width // 2))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


class _UNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        first = nn.relu(nn.Conv(self.width, (3, 3))(x))
        low = nn.relu(nn.Conv(2 * self.width, (3, 3), (2, 2))(first))
        up = nn.ConvTranspose(self.width, (2, 2), (2, 2))(low)
        both = jnp.concatenate([first, up], -1)
        return nn.Conv(2, (1, 1))(nn.relu(nn.Conv(self.width, (3, 3))(both)))


def unet(n=4, width=4, image=8):
    """Segmentation of every pixel (arXiv:1505.04597)."""
    return classifier(_UNet(width), normal(n, image, image, 3), rows(2, n, image, image))


class _Denoiser(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, time):
        embedding = nn.swish(nn.Dense(self.width)(_time_embedding(time, self.width)))
        x = nn.Conv(self.width, (3, 3))(x)
        y = nn.Conv(self.width, (3, 3))(nn.swish(nn.GroupNorm(4)(x)))
        scale, shift = jnp.split(nn.Dense(2 * self.width)(embedding), 2)
        y = nn.GroupNorm(4, use_bias=False, use_scale=False)(y) * (1 + scale) + shift
        x = x + nn.Conv(self.width, (3, 3))(nn.swish(y))
        low = nn.Conv(self.width, (3, 3), (2, 2))(x)
        flat = low.reshape(-1, self.width)
        low = low + nn.MultiHeadDotProductAttention(2)(flat).reshape(low.shape)
        up = jax.image.resize(low, x.shape, "nearest")
        return nn.Conv(3, (3, 3))(jnp.concatenate([x, up], -1))


def diffusion(n=4, width=8, image=8):
    """A U-Net block of a diffusion model; noise and time come from the example's key."""

    def loss(apply, example):
        first, second = jax.random.split(example["key"])
        noise = jax.random.normal(first, example["x"].shape)
        time = jax.random.uniform(second)
        mixed = jnp.sqrt(1 - time) * example["x"] + jnp.sqrt(time) * noise
        return jnp.mean(jnp.square(apply(mixed, time) - noise))

    keys = jax.random.split(jax.random.key(0), n)
    return linen(_Denoiser(width), {"x": normal(n, image, image, 3), "key": keys}, loss)


class _Swin(nn.Module):
    @nn.compact
    def __call__(self, x):
        width, side = 8, 2
        x = nn.Conv(width, (2, 2), (2, 2))(x)  # [4, 4, width]
        table = self.param("bias", nn.initializers.normal(0.02), ((2 * side - 1) ** 2, 2))
        place = np.stack(np.meshgrid(*[np.arange(side)] * 2, indexing="ij"), -1).reshape(-1, 2)
        apart = place[:, None] - place[None] + side - 1
        bias = jnp.moveaxis(table[apart @ [2 * side - 1, 1]], -1, 0)  # [heads, tokens, tokens]
        for shift in (0, 1):
            y = jnp.roll(nn.LayerNorm()(x), (-shift, -shift), (0, 1))
            y = y.reshape(2, side, 2, side, width).swapaxes(1, 2).reshape(4, side * side, 2, -1)
            q, k, v = (nn.DenseGeneral((2, 4), axis=(-2, -1))(y) for _ in range(3))
            weights = jax.nn.softmax(jnp.einsum("wqhd,wkhd->whqk", q, k) + bias)
            y = jnp.einsum("whqk,wkhd->wqhd", weights, v).reshape(2, 2, side, side, width)
            y = y.swapaxes(1, 2).reshape(4, 4, width)
            x = x + nn.Dense(width)(jnp.roll(y, (shift, shift), (0, 1)))
        return nn.Dense(3)(x.mean((0, 1)))


def swin(n=4):
    """Attention in shifted windows with a table of relative positions (arXiv:2103.14030)."""
    return classifier(_Swin(), normal(n, 8, 8, 3))


class _NeRF(nn.Module):
    @nn.compact
    def __call__(self, points):
        angles = points[..., None] * 2.0 ** np.arange(4, dtype=np.float32)
        code = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1).reshape(len(points), -1)
        x = nn.relu(nn.Dense(16)(code))
        x = nn.relu(nn.Dense(16)(jnp.concatenate([x, code], -1)))
        density = nn.softplus(nn.Dense(1)(x)[:, 0])
        color = nn.sigmoid(nn.Dense(3)(x))
        through = jnp.exp(-jnp.cumsum(density) + density)
        return jnp.sum((through * (1 - jnp.exp(-density)))[:, None] * color, 0)


def nerf(n=4, points=12):
    """A radiance field rendered along one ray (arXiv:2003.08934)."""
    return regression(_NeRF(), normal(n, points, 3), normal(n, 3))


class _PointNet(nn.Module):
    @nn.compact
    def __call__(self, points):
        turn = nn.Dense(9)(jnp.max(nn.relu(nn.Dense(8)(points)), 0)).reshape(3, 3)
        x = points @ (turn + jnp.eye(3))
        x = jnp.max(nn.relu(nn.Dense(16)(nn.relu(nn.Dense(8)(x)))), 0)
        return nn.Dense(3)(x)


def pointnet(n=4, points=10):
    """Sets of points, turned by a transform that they predict (arXiv:1612.00593)."""
    return classifier(_PointNet(), normal(n, points, 3))


class _TwoTowers(nn.Module):
    @nn.compact
    def __call__(self, image, captions):
        x = nn.relu(nn.Conv(8, (3, 3), (2, 2))(image)).mean((0, 1))
        words = nn.Embed(13, 8)(captions)  # [captions, tokens, width]
        words = nn.tanh(nn.Dense(8)(words)).mean(1)
        image, text = nn.Dense(6, use_bias=False)(x), nn.Dense(6, use_bias=False)(words)
        unit = lambda v: v / jnp.linalg.norm(v, axis=-1, keepdims=True)  # noqa: E731
        heat = self.param("heat", nn.initializers.constant(1.0), ())
        return jnp.exp(heat) * unit(text) @ unit(image)


def clip(n=4):
    """Two towers (arXiv:2103.00020): one image among its own captions, so no examples meet."""

    def loss(apply, example):
        return cross_entropy(apply(example["image"], example["captions"]), jnp.int32(0))

    captions = np.random.default_rng(0).integers(0, 13, (n, 3, 5), dtype=np.int32)
    return linen(_TwoTowers(), {"image": normal(n, 8, 8, 3), "captions": captions}, loss)


class _Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x, key):
        y = nn.relu(nn.Conv(4, (3, 3), (2, 2))(x)).reshape(-1)
        mean, log_scale = jnp.split(nn.Dense(6)(y), 2)
        z = mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape)
        y = nn.relu(nn.Dense(36)(z)).reshape(3, 3, 4)
        made = nn.ConvTranspose(x.shape[-1], (3, 3), (2, 2))(y)
        divergence = jnp.sum(jnp.square(mean) + jnp.exp(2 * log_scale) - 2 * log_scale - 1) / 2
        return jnp.sum(jnp.square(made - x)) + divergence


def autoencoder(n=4):
    """A convolutional variational autoencoder (arXiv:1312.6114)."""
    keys = jax.random.split(jax.random.key(0), n)
    batch = {"x": normal(n, 6, 6, 1), "key": keys}
    return linen(_Autoencoder(), batch, lambda apply, example: apply(example["x"], example["key"]))
