"""The one gate through which pictures enter: from the bytes of a file to a checked BGR array.

`header` reads what a file claims, `decode` holds the limits, checks, cleans and decodes. No bytes
reach a decoder by another way.
"""

from yolov7.images.decode import decode_image, image_size, read_image, to_bgr

# GIF is read too, but a folder's GIFs are animations: `sources` plays them as videos.
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".dib", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm"}
    | {".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)

__all__ = ["IMAGE_SUFFIXES", "decode_image", "image_size", "read_image", "to_bgr"]
