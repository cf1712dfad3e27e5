"""Structure in a quantised tensor's error: each file holds one estimator, its standard error and its threshold.

W is the reference, F the file's dequantised tensor, E = F - W; all (out, in). Rounding errors have structure only
within a block, where they depend on one rounded scale and minimum. So every null draws signs *per block*.
"""
