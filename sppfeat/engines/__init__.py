"""What computes feature maps: PyTorch or OpenVINO, on the devices of this machine."""
