"""Memory of accelerators, by the makers' data sheets."""

GIB = 1 << 30
MEMORY = {  # bytes; data sheets count in 10^9
    "a100-40gb": 40 * 10**9,
    "a100": 80 * 10**9,
    "h100": 80 * 10**9,
    "h200": 141 * 10**9,
    "b200": 180 * 10**9,
    "l40s": 48 * 10**9,
}
USABLE = 0.92  # the rest is for the context, collectives and what the allocator cannot hand out
