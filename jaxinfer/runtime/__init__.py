"""What runs a model: compiled programs, sampling on the device, the host loops that drive them."""
