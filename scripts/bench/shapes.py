"""Shapes of well-known decoders, from which random ones are built and for which the memory model makes its table."""

from rlaif.decoders import Shape

# Layers, hidden, intermediate, heads, key heads, head size, vocabulary, tied.
SHAPES = {
    "tiny": Shape(4, 256, 704, 8, 2, 32, 4096, False),
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, True),  # Llama 3.2 1B
    "3b": Shape(28, 3072, 8192, 24, 8, 128, 128256, True),  # Llama 3.2 3B
    "8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, False),  # Llama 3.1 8B
    "14b": Shape(48, 5120, 13824, 40, 8, 128, 152064, False),  # Qwen 2.5 14B
}
