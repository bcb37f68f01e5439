"""What training has left in a graph about the size of its activations."""

from __future__ import annotations

BATCHNORM_STATISTICS = "graphopt.batchnorm"
"""Key in `value.meta` of a BatchNormalization's result, kept by the value that takes its place when it is folded.

The entry holds the mean and the standard deviation of each channel over the training data, beta and |gamma|: two
float64 arrays [channels]. It lives in memory only and is lost when the model is saved.
"""
