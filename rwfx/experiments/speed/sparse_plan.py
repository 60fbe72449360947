"""What the part *always-sparse* of a speed measurement measures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvLayer:
    """A convolution 3 x 3 with padding, as in the middle of a network, and its batch."""

    channels: int
    outputs: int
    side: int
    stride: int = 1
    batch_size: int = 32

    @property
    def name(self) -> str:
        """Such as ``64 - 128, 16 x 16, stride 2``."""
        return f"{self.channels} - {self.outputs}, {self.side} x {self.side}" + f", stride {self.stride}" * (
            self.stride > 1
        )


CONVS = (
    *(ConvLayer(16, 16, 32), ConvLayer(16, 32, 32, 2), ConvLayer(32, 32, 16), ConvLayer(64, 64, 8)),
    *(ConvLayer(64, 64, 32), ConvLayer(128, 128, 16), ConvLayer(256, 256, 8), ConvLayer(512, 512, 4)),
)
"""Layers of ResNet-56, and of VGG-16 with all its channels, on images of 32 x 32."""


@dataclass(frozen=True)
class AlwaysSparse:
    """Perceptrons, convolutions, and the densities of both."""

    width: int = 4096
    """Of each layer of a perceptron."""
    layers: int = 2
    batch_size: int = 128
    densities: tuple[float, ...] = (0.1, 0.05, 0.02, 0.01)
    scaling_widths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)
    scaling_batch_sizes: tuple[int, ...] = (16, 128)
    """Each with all of ``scaling_widths``: of a large batch the widest layers' input is larger than the caches."""
    row_nonzeros: int = 32
    """Non-zeros of each row, on average, at all of ``scaling_widths``."""
    dense_bytes: int = 2**31
    """The largest dense gradient of a weight that is made, where RigL updates its topology."""
    convs: tuple[ConvLayer, ...] = CONVS
    conv_densities: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05, 0.02)


ALWAYS_SPARSE = AlwaysSparse()
"""What is measured where nothing is chosen."""


def check_always_sparse(of: AlwaysSparse) -> None:
    """Refuse what makes no measurement.

    Raises:
        ValueError: names it.
    """
    if not all(0 < density <= 1 for density in (*of.densities, *of.conv_densities)):
        raise ValueError(f"a density must be above 0 and at most 1; given {', '.join(map(str, of.densities))}.")
    if min(of.width, *of.scaling_widths) < of.row_nonzeros:
        raise ValueError(f"a width must be at least the {of.row_nonzeros} non-zeros of a row.")
