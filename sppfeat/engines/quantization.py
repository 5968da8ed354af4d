"""Choosing the whole numbers of a network on images: NNCF's post-training quantization, for the engine `openvino`.

Source of the method: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sppfeat.backbones import Network
from sppfeat.engines.calibrated import Array, CalibratedNetwork, Sample
from sppfeat.engines.openvino_conversion import convert
from sppfeat.engines.openvino_engine import compiled, failure, import_openvino, odd_size
from sppfeat.errors import require_extra
from sppfeat.machine import integer_instructions

# The first convolutions see colors, whose few channels differ most in range, and take a tenth of the time: left as they
# are, the cosine to float32 rises from 0.990 to 0.997 on lite0.
_LEFT: Final = 2
# Where weights keep 7 bits, this part of the convolutions is left. On lite0 the cosine rises from 0.9974 to 0.9982 on
# kth-buildings, for 6 % of the speed; of networks that have few, two must be enough.
_PART_LEFT: Final = 6
# How the range of an activation comes from its values, the first that gives descriptors near enough to float32: that of
# the least error on their histogram, or the mean of each image's smallest and largest. On Caltech-101 lite0 loses
# nothing by the first and 0.6 points by the second; MobileNet-v2 has a mean cosine of 0.981 by the first and 0.991.
RANGES: Final = ("HISTOGRAM", "MEAN_MINMAX")
_CONVOLUTIONS: Final = ("Convolution", "GroupConvolution")
_ATTENTION: Final = ("Softmax", "ScaledDotProductAttention")


def quantize(
    network: Network,
    images: Sequence[Any],
    read: Callable[[Any], np.ndarray],
    samples: Sequence[np.ndarray],
    ranges: str = RANGES[0],
) -> CalibratedNetwork:
    """A network of whole numbers, of 8 bits, chosen on images.

    read: an image of `images` as [1, H, W, 3] uint8; called more than once for each. samples: a few images
    [H, W, 3] that are kept with the network, to recognize its values on other processors. ranges: one of
    RANGES. Raises BackboneError, MissingExtraError, and what `read` raises.
    """
    openvino = import_openvino()
    descriptions = network.descriptions
    model = convert(network.backbone, odd_size(descriptions))
    from openvino.passes import ConstantFolding, Manager

    # Weights that are computed from constants would not be recognized as weights.
    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(model)
    operations = model.get_ordered_ops()
    kinds = {each.get_type_name() for each in operations}
    whole = bool(integer_instructions())
    convolutions = [each.get_friendly_name() for each in operations if each.get_type_name() in _CONVOLUTIONS]
    left = _LEFT if whole else max(_LEFT, len(convolutions) // _PART_LEFT)
    with _quiet():
        nncf = require_extra("nncf", "int8", "precision int8")
        try:
            quantized = nncf.quantize(
                model,
                nncf.Dataset(images, read),
                subset_size=len(images),
                target_device=nncf.TargetDevice.CPU,
                model_type=nncf.ModelType.TRANSFORMER if kinds.intersection(_ATTENTION) else None,
                ignored_scope=nncf.IgnoredScope(names=convolutions[:left]),
                # By running the network layer by layer: on Caltech-101, the fast way loses 0.6 points, this one none.
                fast_bias_correction=False,
                advanced_parameters=_parameters(nncf, ranges, whole),
            )
        except (RuntimeError, nncf.errors.InternalError, nncf.errors.ValidationError) as error:
            raise failure(descriptions, error) from None
    runnable = compiled(descriptions, quantized, {"INFERENCE_PRECISION_HINT": "f32"})
    kept = []
    for image in samples:
        outputs = runnable(image[None])
        cells = [Array.of(outputs[number][0]) for number in range(len(descriptions))]
        kept.append(Sample(Array.of(image), cells))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.xml")
        openvino.save_model(quantized, path, compress_to_fp16=False)
        return CalibratedNetwork(path.read_bytes(), path.with_suffix(".bin").read_bytes(), kept)


def _parameters(nncf: Any, ranges: str, whole: bool) -> Any:
    """NNCF's parameters. whole: whether weights have all 8 bits.

    Values get one range for all channels. A range for each channel before depthwise convolutions, NNCF's default, cuts
    off what a channel did not show when calibrated: calibrated on buildings, the mean cosine to float32 of other images
    was 0.94, and is 0.998. Where sums of two products must fit into 16 bits, weights keep 7: held to AVX2, it is 0.996
    instead of 0.993, at the same speed.
    """
    from nncf.quantization.advanced_parameters import QuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    return nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.FIRST_LAYER if whole else nncf.OverflowFix.ENABLE,
        activations_quantization_params=QuantizationParameters(per_channel=False),
        activations_range_estimator_params=getattr(RangeEstimatorParametersSet, ranges),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNCF logs, draws bars, and warns of the versions of what it imports, on both streams."""
    loggers = [logging.getLogger(name) for name in ("nncf", "torch.utils.cpp_extension")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
