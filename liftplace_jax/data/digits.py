"""The embedded data set: scikit-learn's 1,797 real 8x8 digits as a TFDS builder."""

from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from sklearn.datasets import load_digits

TEST_PER_CLASS = 36  # 10 x 36 = 360 test images, the other 1,437 train


def split_indices(labels):
    """The fixed split: of each class, 36 examples drawn by Philox with seed 0 are the test split.

    Args:
      labels: (N,) integer class of every example, in scikit-learn's order.

    Returns:
      (train, test), two increasing int arrays that together hold every index once.
    """
    # Raw bits, not Generator.permutation: NumPy keeps only the former the same for ever.
    rank = np.random.Philox(0).random_raw(len(labels))
    test = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        test.append(members[np.argsort(rank[members], kind="stable")[:TEST_PER_CLASS]])
    test = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), test), test


class Digits(tfds.core.GeneratorBasedBuilder):
    """8x8 grey images of handwritten digits, ten classes; 1,437 train and 360 test images.

    `image` is (8, 8, 1) uint8, round(v * 255 / 16) of the file's 0..16; `label` is 0..9.
    The file ships with scikit-learn, so nothing is downloaded.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "36 test images of each class."}
    # Said outright because TFDS looks it up through importlib_resources, which it does not
    # declare (tensorflow/datasets#11212).
    code_path = epath.Path(__file__)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="The UCI optical recognition of handwritten digits test set, 8x8 pixels.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        digits: Any = load_digits()
        train, test = split_indices(digits.target)
        return {"train": self._generate_examples(train), "test": self._generate_examples(test)}

    def _generate_examples(self, indices):
        digits: Any = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        for index in indices:
            yield int(index), {"image": images[index], "label": int(digits.target[index])}
