"""Feynman-Kac particle steering: sampling p(x) exp(lambda r(x)) from an unmodified model at inference time."""
