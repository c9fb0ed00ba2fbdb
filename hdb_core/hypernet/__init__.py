"""The hypernetwork: photos of a person in, that person's LiDB out."""

from .encoder import EncoderConfig, preprocess
from .network import HyperNet, HyperNetConfig
from .predict import predict

__all__ = ["EncoderConfig", "HyperNet", "HyperNetConfig", "predict", "preprocess"]
