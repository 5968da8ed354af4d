"""SPP-net object detection: annotations, training, the detector, its evaluation, and drawings."""
