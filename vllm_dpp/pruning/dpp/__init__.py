"""The determinantal point process: kernels, greedy MAP inference on every device, and its costs."""
