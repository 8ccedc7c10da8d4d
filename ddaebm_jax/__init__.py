"""Denoising Diffusion Adversarial Energy-Based Models in JAX."""

__version__ = "0.1.0"
