"""Parameters of single layers, with their biases, for counting models from their configs."""


def conv(kernel: int, inputs: int, outputs: int) -> int:
    """Of a kernel x kernel convolution."""
    return outputs * (kernel * kernel * inputs + 1)


def dense(inputs: int, outputs: int) -> int:
    """Of a linear layer."""
    return outputs * (inputs + 1)


def norm(channels: int) -> int:
    """Of an affine normalisation."""
    return 2 * channels
