"""FLUX.2's blocks with fused elementwise kernels, and their products in fp8."""
