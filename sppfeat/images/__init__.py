"""Finding images, reading one safely, resizing it, and batching images of equal shape."""
