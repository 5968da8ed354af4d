"""Windows on images: reading, naming, mapping onto a feature map, proposals, and the boxes they end in."""
