"""Feynman-Kac particle steering at sampling time, of models that stay as they are.

The samples follow p(x) exp(lambda r(x)) / Z, where r is a reward and lambda the tilt.
"""
