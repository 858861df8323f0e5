"""Tags of TIFF by name, and the values that some of them take, in words."""

SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
FILL_ORDER, STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP = 266, 273, 274, 277, 278
STRIP_NBYTES, PLANAR, T4_OPTIONS, T6_OPTIONS, PREDICTOR = 279, 284, 292, 293, 317
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_NBYTES = 322, 323, 324, 325
SUBIFDS, EXTRA, SAMPLE_FORMAT, ICC, DNG = 330, 338, 339, 34675, 50706

COMPRESSIONS = {
    1: "none", 2: "CCITT RLE", 3: "CCITT group 3", 4: "CCITT group 4", 5: "LZW", 6: "old JPEG",
    7: "JPEG", 8: "deflate", 32773: "PackBits", 32946: "deflate", 34887: "LERC", 34925: "LZMA",
    34712: "JPEG 2000", 34933: "PNG", 50000: "Zstandard", 50001: "WebP", 50002: "JPEG XL",
    32809: "ThunderScan", 32766: "NeXT", 34676: "SGI log", 34677: "SGI log 24",
    33003: "Aperio JPEG 2000 YCbCr", 33005: "Aperio JPEG 2000 RGB", 34934: "JPEG XR",
}  # fmt: skip
PHOTOMETRICS = {
    0: "inverted grey", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr",
    8: "CIELAB", 9: "ICCLAB", 10: "ITULAB", 32844: "LogL", 32845: "LogLuv",
}  # fmt: skip
