"""Handwritten digits that scikit-learn carries: 1,797 grey images of 8x8 pixels, so nothing to download."""

import numpy as np

from ..errors import UserError
from .dataset import Dataset, Source, make_split, pixel_statistics, stratified_positions

_SPLIT_SEED = 0


def load(source: Source) -> Dataset:
    """Load the digits: three quarters for training and one quarter for testing, always the same ones.

    Values 0 to 16 become 0 to 255. The images are neither cropped nor flipped: at 8 pixels a shift loses the digit.
    """
    if source.data_dir is not None:
        raise UserError(f"the data set 'digits' is built in: leave out --data-dir {str(source.data_dir)!r}.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the data set 'digits' comes with scikit-learn: run `pip install scikit-learn`.") from error

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    test, train = stratified_positions(labels, len(labels) // 4, 10, _SPLIT_SEED)
    mean, std = pixel_statistics(images[train])
    return Dataset(
        name="digits",
        train=make_split(images[train], labels[train], clean=True, index=train),
        test=make_split(images[test], labels[test], clean=True, index=test),
        class_names=tuple(str(digit) for digit in range(10)),
        superclasses=None,
        mean=mean,
        std=std,
        crop_padding=0,
        flip=False,
    )
