"""Pretrained networks: the registry, their weights, where a network is cut, and the geometry of its feature maps."""
