"""The formats pyquant reads, writes and computes on. Everything here is plain torch on plain tensors.

Notation, used in every docstring of the package:

======== =====================================================================
M        tokens (rows of an activation)
N        output features, rows of a weight
K        input features, columns of a weight
G        group size along K (``-1`` = one group per row, "per channel")
B, S     batch, positions
Hq, Hkv  query heads, key/value heads
D, V     head size, vocabulary
codes    uint8 ``[N, K]``, one unpacked code 0..15 an element
packed   int32, the portable order that is stored on disk
qweight  int32, the tiled order that every kernel reads
scale    ``[N, ceil(K/G)]`` row-major, or the same values in tiled order
zero     like scale, integers 0..15; ``None`` means symmetric, i.e. 8
w_hat    ``(codes - zero) * scale``, the weight that the codes stand for
======== =====================================================================

Times are in microseconds, bandwidth in GB/s (1e9 bytes), memory in GiB.
"""
