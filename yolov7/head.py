"""The detection head: one 1x1 convolution per level, implicit knowledge, decoding."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def _implicit(count: Sequence[int], mean: float) -> nn.ParameterList:
    vectors = [torch.empty(1, c, 1, 1) for c in count]
    for vector in vectors:
        if not vector.is_meta:  # for which PyTorch would load its compiler: two seconds
            vector.normal_(mean, 0.02)
    return nn.ParameterList(nn.Parameter(vector) for vector in vectors)


class Detect(nn.Module):
    """Raw outputs of every level and their decoding into boxes.

    Args:
        channels: of each level's input, finest level first.
        num_classes: number of classes.
        anchors: (w, h, w, h, ...) of each level in pixels.
        strides: of each level in pixels.
        implicit: ImplicitA on the input and ImplicitM on the output of each level (section 4.3).
        auxiliary: channels of the auxiliary levels' inputs; empty: no auxiliary heads.
    """

    anchors: Tensor  # [levels, anchors, 2] (w, h) in pixels

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        anchors: Sequence[Sequence[float]],
        strides: Sequence[int],
        *,
        implicit: bool,
        auxiliary: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_outputs = 5 + num_classes  # x, y, w, h, objectness, classes
        self.strides = tuple(strides)
        self.register_buffer(
            "anchors", torch.tensor(anchors, dtype=torch.float32).view(len(strides), -1, 2)
        )
        outputs = self.anchors.shape[1] * self.num_outputs
        self.lead = nn.ModuleList(nn.Conv2d(c, outputs, 1) for c in channels)
        self.auxiliary = nn.ModuleList(nn.Conv2d(c, outputs, 1) for c in auxiliary)
        self.implicit_a = _implicit(channels if implicit else (), 0.0)
        self.implicit_m = _implicit([outputs] * len(channels) if implicit else (), 1.0)
        self.reset_biases()

    @torch.no_grad()
    def reset_biases(self) -> None:
        """Start from about 8 objects per 640-pixel image and 0.6 / classes as class probability."""
        for layers in (self.lead, self.auxiliary):
            for layer, stride in zip(layers, self.strides, strict=False):
                bias = layer.bias.view(self.anchors.shape[1], -1)  # type: ignore[operator]  # a Conv2d's
                bias[:, 4] += math.log(8 / (640 / stride) ** 2)
                bias[:, 5:] += math.log(0.6 / (self.num_classes - 0.99))

    def raw(self, features: Sequence[Tensor], auxiliary: Sequence[Tensor] = ()) -> list[Tensor]:
        """Undecoded outputs [B, anchors, ny, nx, 5 + classes], lead levels, then auxiliary ones."""
        outputs = []
        for i, (x, conv) in enumerate(zip(features, self.lead, strict=True)):
            if self.implicit_a:
                outputs.append(conv(x + self.implicit_a[i]) * self.implicit_m[i])
            else:
                outputs.append(conv(x))
        outputs += [conv(x) for x, conv in zip(auxiliary, self.auxiliary, strict=False)]
        return [
            y.view(
                y.shape[0], self.anchors.shape[1], self.num_outputs, y.shape[2], y.shape[3]
            ).permute(0, 1, 3, 4, 2)
            for y in outputs
        ]

    def decode(self, raw: Sequence[Tensor]) -> Tensor:
        """Boxes of the lead levels.

        Args:
            raw: outputs of `raw`; those of auxiliary levels are ignored.

        Returns:
            [B, N, 5 + classes], at least fp32: centre x, y, width, height in pixels, objectness,
            class probabilities; levels in order, within a level anchor, row, column.
        """
        decoded = []
        for y, anchors, stride in zip(raw, self.anchors, self.strides, strict=False):
            batch, _, height, width, _ = y.shape
            y = y.to(torch.promote_types(y.dtype, torch.float32))  # bf16 would be pixels off
            s = y.sigmoid()
            sides = [torch.arange(n, device=y.device, dtype=y.dtype) for n in (width, height)]
            # Of one shape, [1, anchors, ny, nx, 2]: constants of an exported graph, where OpenCV
            # before 4.7 knows no other.
            whole = (1, len(anchors), height, width, 2)
            cells = torch.stack(torch.meshgrid(*sides, indexing="xy"), -1).expand(whole)
            sizes = anchors.to(y.dtype).view(1, -1, 1, 1, 2).expand(whole)
            centre = (2 * s[..., :2] - 0.5 + cells) * stride
            twice = 2 * s[..., 2:4]
            size = twice * twice * sizes
            rows = torch.cat([centre, size, s[..., 4:]], -1)
            decoded.append(rows.reshape(batch, -1, self.num_outputs))
        return torch.cat(decoded, 1)

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the implicit vectors and drop the auxiliary heads, in place.

        With W the weight, b the bias, a and m the vectors: W' = W m, b' = (b + W a) m.
        """
        for conv, a, m in zip(self.lead, self.implicit_a, self.implicit_m, strict=False):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            weight, m = conv.weight.double(), m.double().flatten()
            bias = conv.bias.double() + weight.flatten(1) @ a.double().flatten()
            conv.weight.copy_(weight * m[:, None, None, None])
            conv.bias.copy_(bias * m)
        self.implicit_a = self.implicit_m = nn.ParameterList()
        self.auxiliary = nn.ModuleList()
