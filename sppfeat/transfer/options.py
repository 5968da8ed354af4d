"""Protocols of a transfer evaluation and their options, checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from sppfeat.errors import UsageError, unknown_name
from sppfeat.svm import COST_GRIDS, SvmOptions

PROTOCOLS: Final = ("random", "caltech101", "split", "voc2007", "voc2007-vissl")
CLASSIFIERS: Final = ("svm", "knn", "logistic")
# The splits of all trials are drawn at once; published protocols have at most 100 trials.
MAX_TRIALS: Final = 1000


@dataclass(frozen=True, kw_only=True)
class TransferOptions(SvmOptions):
    """How a transfer evaluation is done.

    protocol: `random`, half of each class for training and the rest for testing, 5 trials; `caltech101`, 30 training
    rows per class, up to 50 of the rest for testing, 10 trials (Fei-Fei, Fergus, Perona 2004; the SPP-net paper);
    `split`, by the first folder of the names, `train` or `test`, or by the labels file; if there is no `test`, `val`,
    `valid` or `validation` is tested; `voc2007`, the lists of a VOC folder, where an image can have several classes;
    `voc2007-vissl`, the same as VISSL evaluates it: AP as the area under the curve, difficult objects as absent, C from
    VISSL's grid and folds in the order of the images, positives weighing 2.
    classifier: `svm`, one against the rest; `knn`, the `neighbors` nearest training images, which vote with weight
    exp(cosine similarity / temperature); `logistic`, multinomial logistic regression, C chosen as for SVMs.
    shots: numbers of training images per class, for a curve besides; each is drawn anew in each trial, `trials` times
    (3) where the split is fixed.
    per_class, max_test, trials: for the random protocols; None: those of the protocol.
    Raises UsageError, naming the field, for an invalid value.
    """

    protocol: str = "random"
    per_class: int | None = None
    max_test: int | None = None
    trials: int | None = None
    classifier: str = "svm"
    neighbors: int = 20
    temperature: float = 0.07
    shots: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol not in PROTOCOLS:
            raise UsageError(unknown_name("protocol", self.protocol, PROTOCOLS))
        if self.classifier not in CLASSIFIERS:
            raise UsageError(unknown_name("classifier", self.classifier, CLASSIFIERS))
        if self.classifier != "svm" and self.positive_weight != 1:
            raise UsageError(f"positive_weight: expected classifier svm, found {self.classifier}")
        if self.classifier == "knn" and self.device not in ("auto", "cpu"):
            raise UsageError(f"classifier knn: expected device auto or cpu, found {self.device}")
        if self.several and self.classifier == "logistic":
            raise UsageError(f"classifier logistic: expected one class per image, found protocol {self.protocol}")
        if not isinstance(self.neighbors, int) or not 1 <= self.neighbors <= 10_000:
            raise UsageError(f"neighbors must be from 1 to 10000, found {self.neighbors!r}")
        if not 1e-4 <= self.temperature <= 1e4:
            raise UsageError(f"temperature must be from 0.0001 to 10000, found {self.temperature}")
        if self.shots and (min(self.shots) < 1 or len(set(self.shots)) != len(self.shots)):
            raise UsageError(f"shots must be different numbers above 0, found {','.join(map(str, self.shots))}")
        if self.shots and self.several:
            raise UsageError(f"shots: expected one class per image, found protocol {self.protocol}")
        for name in ("per_class", "max_test", "trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, found {value}")
            if value is not None and name == "trials" and value > MAX_TRIALS:
                raise UsageError(f"trials must be at most {MAX_TRIALS}, found {value}")
            fixed = self.several or self.protocol == "split" and not (name == "trials" and self.shots)
            if value is not None and fixed:
                raise UsageError(f"{name} does not apply to protocol {self.protocol}, whose splits are fixed")

    @property
    def several(self) -> bool:
        """Whether an image can have several classes."""
        return self.protocol in ("voc2007", "voc2007-vissl")

    @property
    def svm(self) -> SvmOptions:
        """How the protocol trains SVMs, and chooses C."""
        if self.protocol != "voc2007-vissl":
            return self
        default = TransferOptions()
        return replace(
            self,
            costs=COST_GRIDS["vissl"] if self.costs == default.costs else self.costs,
            shuffle=False,
            positive_weight=2.0 if self.positive_weight == default.positive_weight else self.positive_weight,
        )
