"""Recipes: pure functions over plain modules that take a model from full precision to low-bit weights.

``RECIPES`` names them for the command line: name -> one sentence.
"""

RECIPES = {
    "rtn": "round to nearest, ranges from the weights alone (min-max, or clipped for the least squared error); seconds",
    "gptq": "round column by column, the rest makes up for the error; needs some text and minutes",
    "blockwise": "train roundings and ranges block by block, jointly or against later blocks; needs text and minutes",
    "bisup": "round inputs too, and train clips, smoothing and a low-rank correction block by block; needs text and minutes",
    "kd-qat": "train weights and scales through the quantizer against the full-precision teacher; needs text and time",
    "soft-qat": "the same with continuous approximations of rounding and clamping; a teacher is an option",
}

__all__ = ["RECIPES"]
