"""Spatial pyramid pooling of whole feature maps and of windows on them."""
