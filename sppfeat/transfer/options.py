"""Protocols of a transfer evaluation and their options, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sppfeat.errors import UsageError, unknown_name
from sppfeat.svm import SvmOptions

PROTOCOLS: Final = ("random", "caltech101", "split", "voc2007")
# The splits of all trials are drawn at once; published protocols have at most 100 trials.
MAX_TRIALS: Final = 1000


@dataclass(frozen=True, kw_only=True)
class TransferOptions(SvmOptions):
    """How a transfer evaluation is done.

    protocol: `random`, half of each class for training and the rest for testing, 5 trials; `caltech101`, 30 training
    rows per class, up to 50 of the rest for testing, 10 trials (Fei-Fei, Fergus, Perona 2004; the SPP-net paper);
    `split`, by the first folder of the names, `train` or `test`, or by the labels file; if there is no `test`, `val`,
    `valid` or `validation` is tested; `voc2007`, the lists of a VOC folder, where an image can have several classes.
    per_class, max_test, trials: for the random protocols; None: those of the protocol.
    Raises UsageError, naming the field, for an invalid value.
    """

    protocol: str = "random"
    per_class: int | None = None
    max_test: int | None = None
    trials: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol not in PROTOCOLS:
            raise UsageError(unknown_name("protocol", self.protocol, PROTOCOLS))
        for name in ("per_class", "max_test", "trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, found {value}")
            if value is not None and name == "trials" and value > MAX_TRIALS:
                raise UsageError(f"trials must be at most {MAX_TRIALS}, found {value}")
            if value is not None and self.protocol in ("split", "voc2007"):
                raise UsageError(f"{name} does not apply to protocol {self.protocol}, whose splits are fixed")
