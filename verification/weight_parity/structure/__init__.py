"""Structure in a quantised tensor's error: each file one estimator, with its standard error and its threshold.

W is the reference, F the file's dequantised tensor, E = F - W; all (out, in). Rounding has no structure but what its
blocks share: errors within a block depend on one rounded scale and minimum, so every null draws signs *per block*.
"""
