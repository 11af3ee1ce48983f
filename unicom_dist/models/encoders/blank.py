"""The features of a black picture, which stand for "no picture" in classifier-free guidance of the decoder.

Ref: BLIP3-o's reconstruction, which guides a decoder of image features by those of a blank image.
"""

from PIL import Image

from unicom_dist.config.schema import EncoderConfig
from unicom_dist.models.encoders.base import EncodedImage, Encoder


def blank_features(encoder: Encoder, config: EncoderConfig) -> EncodedImage:
    """Of a black square of `config.image_px` a side, whatever the shape of the pictures beside it."""
    black = Image.new("RGB", (config.image_px, config.image_px))
    return encoder.encode([encoder.preprocess(black)])[0]
