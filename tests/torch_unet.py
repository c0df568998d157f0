"""The DDPM U-Net in PyTorch, written for the tests: the peer that state dicts are checked with.

Its names are those of the published checkpoints; test_checkpoints.py checks its outputs against
the published model's arrays.
"""

import math

import torch
from torch import nn
from torch.nn.functional import interpolate, pad, silu


class Residual(nn.Module):
    def __init__(self, inputs, width, embedding, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.temb_proj = nn.Linear(embedding, width)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if inputs != width:
            self.nin_shortcut = nn.Conv2d(inputs, width, 1)

    def forward(self, x, temb):
        h = self.conv1(silu(self.norm1(x))) + self.temb_proj(silu(temb))[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x, temb):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1]), -1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))


class Resample(nn.Module):
    def __init__(self, width, up):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, **({"padding": 1} if up else {"stride": 2}))
        self.up = up

    def forward(self, x):
        return self.conv(interpolate(x, scale_factor=2) if self.up else pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    def __init__(self, inputs, width, attention, embedding, groups):
        super().__init__()
        self.block = nn.ModuleList(Residual(i, width, embedding, groups) for i in inputs)
        self.attn = nn.ModuleList(Attention(width, groups) for _ in inputs if attention)


class TorchUNet(nn.Module):
    """As `UNetConfig` with these fields; forward takes (N, C, H, W) images and timesteps."""

    def __init__(
        self,
        *,
        image_size,
        in_channels,
        out_channels,
        ch,
        ch_mult,
        num_res_blocks,
        attn_resolutions,
        num_groups,
    ):
        super().__init__()
        self.ch, embedding, groups = ch, 4 * ch, num_groups
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, embedding), nn.Linear(embedding, embedding)])
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down, self.up, skips, width = nn.ModuleList(), nn.ModuleList(), [ch], ch
        attention = [image_size >> i in attn_resolutions for i in range(len(ch_mult))]
        for i, mult in enumerate(ch_mult):
            inputs = [width] + [ch * mult] * (num_res_blocks - 1)
            width = ch * mult
            level = Level(inputs, width, attention[i], embedding, groups)
            skips += [width] * num_res_blocks
            if i < len(ch_mult) - 1:
                level.downsample = Resample(width, up=False)
                skips.append(width)
            self.down.append(level)
        self.mid = nn.Module()
        self.mid.block_1 = Residual(width, width, embedding, groups)
        self.mid.attn_1 = Attention(width, groups)
        self.mid.block_2 = Residual(width, width, embedding, groups)
        for i in reversed(range(len(ch_mult))):
            inputs, last = [], width
            width = ch * ch_mult[i]
            for _ in range(num_res_blocks + 1):
                inputs.append(last + skips.pop())
                last = width
            level = Level(inputs, width, attention[i], embedding, groups)
            if i:
                level.upsample = Resample(width, up=True)
            self.up.insert(0, level)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x, t):
        half = self.ch // 2
        steps = torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
        angles = t[:, None].float() * steps
        temb = self.temb.dense[0](torch.cat([angles.sin(), angles.cos()], 1))
        temb = self.temb.dense[1](silu(temb))
        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for i, block in enumerate(level.block):
                h = block(h, temb)
                h = level.attn[i](h, temb) if len(level.attn) else h
                skips.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
                skips.append(h)
        for layer in (self.mid.block_1, self.mid.attn_1, self.mid.block_2):
            h = layer(h, temb)
        for level in reversed(self.up):
            for i, block in enumerate(level.block):
                h = block(torch.cat([h, skips.pop()], 1), temb)
                h = level.attn[i](h, temb) if len(level.attn) else h
            h = level.upsample(h) if hasattr(level, "upsample") else h
        return self.conv_out(silu(self.norm_out(h)))


def randomise(module, seed=0):
    """Every parameter random, norms and biases too; returns the module."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
        else:
            nn.init.normal_(parameter, 0.0, 1.5 / math.sqrt(parameter[0].numel()))
    return module.eval()
