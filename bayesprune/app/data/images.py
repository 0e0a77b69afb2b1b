"""Labelled images for the command line: training, validation and test loaders by name.

What is chosen (thresholds, stopping points, sizes) is chosen on `validation`; `test` is for the final number alone.
The splits do not depend on the seed, so a model of one run can be measured by the next.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bayesprune.app.data import Loaders, last_tenth_of_each_class

# in_chans and image size of the torchvision data sets that come with labels for every image.
_TORCHVISION = {
    "cifar10": (3, 32),
    "cifar100": (3, 32),
    "fashion_mnist": (1, 28),
    "imagenet": (3, 224),
    "kmnist": (1, 28),
    "mnist": (1, 28),
}
_TRAIN_FOLDERS = ("train", "training")
_VALIDATION_FOLDERS = ("validation", "val", "valid", "eval", "evaluation")
_TEST_FOLDERS = ("test", "testing")


@dataclass(frozen=True)
class Data(Loaders):
    """Loaders of (images, labels) with images of `input_size`, and what a model needs to know to fit them."""

    input_size: tuple[int, int, int]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Labels are below this."""
        return len(self.class_names)

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return self.input_size[0]


def load_data(
    spec: str = "digits",
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    in_chans: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    augment: bool = False,
    test_split: str = "test",
    download: bool = False,
    num_workers: int = 0,
) -> Data:
    """Train, validation and test loaders of a named data set or an image folder.

    Args:
        spec: One of
            `digits` (scikit-learn's 1,797 handwritten digits, part of its package; split 60 / 20 / 20 by class);
            `torch/NAME` (torchvision: cifar10, cifar100, fashion_mnist, imagenet, kmnist, mnist);
            `hfds/NAME` (a Hugging Face data set with `image` and `label`);
            a folder with `train/CLASS/*` and `validation/CLASS/*` or `test/CLASS/*`.
            Where no validation split goes with a test split, the last tenth of each training class is held out for it.
        root: Where torchvision (default `data`) or Hugging Face keep their files.
        image_size: Side of the square images; by default `config`'s, else the data set's own (folders: 224).
        in_chans: 1 or 3; by default the data set's own. Images are converted.
        batch_size: Images in a batch, of all three loaders.
        seed: Of the order of the training batches.
        config: timm's data configuration of a model, `timm.data.resolve_data_config(model=model)`: mean, std,
            interpolation, crop. `digits` is always normalised by its own mean and std.
        transform: From a PIL image to a tensor, in place of what `config` says, where nothing is augmented. `digits`
            are no PIL images.
        augment: Random crops of at least half the image, and mirror images, for training. Not for digits and letters.
        test_split: Name of the test split of a Hugging Face data set.
        download: Let torchvision download what is missing in `root`.
        num_workers: Processes that load images.

    Raises:
        ValueError: `spec` is none of the above, a split or a class is missing, or there is one class alone.
        ModuleNotFoundError: scikit-learn (digits) or timm (everything else) is not installed.
    """
    if in_chans not in (None, 1, 3):
        raise ValueError(f"load_data got in_chans={in_chans}; images have 1 (grey) or 3 (RGB) channels")
    if spec == "digits":
        if augment:
            raise ValueError("load_data got augment=True for digits: mirrored digits are no digits; leave it out")
        splits, input_size = _digits(image_size or 32, in_chans or 1)
        names = tuple(map(str, range(10)))
    else:
        config = dict(config or {})
        train, validation, test, native_size = _image_datasets(spec, root, test_split, download)
        side = image_size or config.get("input_size", native_size)[-1]
        input_size = (in_chans or native_size[0], side, side)
        labels = _labels(train)
        names = _class_names(train, labels)
        if len(labels.unique()) < 2:
            raise ValueError(
                f"load_data got {spec!r}, whose training images are all of one class, {names[-1]!r}; expected two "
                "classes or more, in a folder one folder of images per class"
            )
        for split, of_split in (("training", train), ("validation", validation), ("test", test)):
            _check_labels(spec, split, () if of_split is None else _labels(of_split).tolist(), names)
        kept = range(len(labels))
        held_out: Sequence[int] = range(len(_labels(validation))) if validation is not None else ()
        if validation is None:
            validation = train
            kept, held_out = last_tenth_of_each_class(labels, what="image")
        plain = transform or _transform(input_size, config, augment=False)
        held = _Images(validation, held_out, plain, input_size[0])
        channels, height, width = held[0][0].shape  # which a given transform decides
        input_size = (channels, height, width)
        training = _transform(input_size, config, augment=True) if augment else plain
        splits = (
            _Images(train, kept, training, channels),
            held,
            _Images(test, range(len(_labels(test))), plain, channels),
        )
    sizes = tuple(len(split) for split in splits)
    return Data(
        train=DataLoader(
            splits[0],
            batch_size=batch_size,
            shuffle=True,
            drop_last=sizes[0] >= batch_size,  # batch norm cannot train on a last batch of one image
            generator=torch.Generator().manual_seed(seed),
            num_workers=num_workers,
        ),
        validation=DataLoader(splits[1], batch_size=batch_size, num_workers=num_workers),
        test=DataLoader(splits[2], batch_size=batch_size, num_workers=num_workers),
        num_data=sizes[0],
        class_names=names,
        input_size=input_size,
        description=f"{spec}: {sizes[0]:,} training, {sizes[1]:,} validation, {sizes[2]:,} test images of "
        f"{'x'.join(map(str, input_size))}, {len(names)} classes",
    )


class _Images(Dataset[tuple[Tensor, int]]):
    """Some images of a data set, converted and transformed."""

    def __init__(self, dataset: Any, indices: Sequence[int], transform: Any, in_chans: int) -> None:
        self.dataset = dataset
        self.indices = indices
        self.transform = transform
        self.convert = operator.methodcaller("convert", "L" if in_chans == 1 else "RGB")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[self.indices[index]]
        return self.transform(self.convert(image)), label


def _digits(image_size: int, in_chans: int) -> tuple[list[TensorDataset], tuple[int, int, int]]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the digits come with scikit-learn, which is not installed: pip install "bayesprune[digits]"'
        ) from error
    pixels, targets = load_digits(return_X_y=True)
    labels = torch.as_tensor(targets)
    rest, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=0.25, stratify=labels[rest], random_state=0)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    images = F.interpolate(images, (image_size, image_size), mode="bilinear", align_corners=False)
    std, mean = torch.std_mean(images[train])
    images = ((images - mean) / std).repeat(1, in_chans, 1, 1)
    return (
        [TensorDataset(images[indices], labels[indices]) for indices in (train, validation, test)],
        (in_chans, image_size, image_size),
    )


def _image_datasets(
    spec: str, root: str | Path | None, test_split: str, download: bool
) -> tuple[Any, Any, Any, tuple[int, int, int]]:
    """Train, validation (or None) and test sets of PIL images without a transform, and the size of an image."""
    library, _, name = spec.partition("/")
    is_folder = library not in ("torch", "hfds")
    if library == "torch" and name not in _TORCHVISION:
        raise ValueError(f"load_data got {spec!r}; of torchvision it knows {', '.join(_TORCHVISION)}")
    if library == "hfds" and not name:
        raise ValueError(f"load_data got {spec!r}; expected the name of a data set of Hugging Face after hfds/")
    if is_folder and not Path(spec).is_dir():
        raise ValueError(
            f"load_data got {spec!r}, which is no folder; expected 'digits', 'torch/NAME', 'hfds/NAME' or a folder "
            "with train/CLASS/* and validation/CLASS/* or test/CLASS/*"
        )
    try:
        from timm.data.dataset_factory import create_dataset
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ModuleNotFoundError(
            f'{spec!r} is read by timm, which is not installed: pip install "bayesprune[timm]"'
        ) from error

    def create(*args: Any, **options: Any) -> Any:
        try:
            return create_dataset(*args, **options)
        except RuntimeError as error:  # no images there, or none of a kind that is known
            raise ValueError(f"load_data got {spec!r}, which cannot be read: {error}") from error

    if library == "torch":
        in_chans, side = _TORCHVISION[name]
        options: dict[str, Any] = {} if name == "imagenet" else {"download": download}
        directory = str(root or "data")
        train, test = (create(spec, root=directory, split=split, **options) for split in ("train", "validation"))
        return train, None, test, (in_chans, side, side)
    if library == "hfds":
        train, test = (create(spec, root=root and str(root), split=split) for split in ("train", test_split))
        validation = None
    else:
        train, validation, test = _folder_splits(Path(spec), create)
    for split in (validation, test):
        if split is not None and split.reader.class_to_idx != train.reader.class_to_idx:
            differing = sorted(split.reader.class_to_idx.keys() ^ train.reader.class_to_idx.keys())
            raise ValueError(
                f"load_data got {spec!r}, whose splits have different classes: {', '.join(map(str, differing))} "
                "is in one and not in the other; labels would not mean the same, so each split needs every class"
            )
    return train, validation, test, (3, 224, 224)


def _folder_splits(folder: Path, create: Any) -> tuple[Any, Any, Any]:
    def split(names: Sequence[str]) -> Any:
        found = next((folder / name for name in names if (folder / name).is_dir()), None)
        return None if found is None else create("", root=str(found), search_split=False)

    train, validation, test = split(_TRAIN_FOLDERS), split(_VALIDATION_FOLDERS), split(_TEST_FOLDERS)
    if test is None:
        validation, test = None, validation
    if train is None or test is None:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"load_data got the folder {str(folder)!r} with {found}; expected a folder train with one folder of images "
            "per class in it, and beside it a folder validation or test, or both, with the same classes"
        )
    return train, validation, test


def _labels(dataset: Any) -> Tensor:
    """Labels of all images in order, without reading an image."""
    if hasattr(dataset, "targets"):
        return torch.as_tensor(dataset.targets)
    reader = dataset.reader
    return torch.as_tensor(
        [label for _, label in reader.samples] if hasattr(reader, "samples") else reader.dataset[reader.label_key][:]
    )


def _check_labels(spec: str, split: str, labels: Sequence[int], names: Sequence[str]) -> None:
    wrong = [label for label in labels if not 0 <= label < len(names)]
    if wrong:
        raise ValueError(
            f"load_data got {spec!r}, whose {split} images have the label {wrong[0]} ({len(wrong):,} of "
            f"{len(labels):,}); expected numbers of the {len(names)} training classes, from 0 on. Leave out images "
            "without a label, or name a split whose labels are known"
        )


def _class_names(dataset: Any, labels: Tensor) -> tuple[str, ...]:
    """Of the labels from 0 to the largest; the labels themselves where the classes have no names."""
    numbers = range(int(labels.max()) + 1)
    reader = getattr(dataset, "reader", None)
    of_name = getattr(reader, "class_to_idx", None) if reader else {name: i for i, name in enumerate(dataset.classes)}
    names = {number: name for name, number in (of_name or {}).items()}
    return tuple(str(names.get(number, number)) for number in numbers)


def _transform(input_size: tuple[int, int, int], config: Mapping[str, Any], *, augment: bool) -> Any:
    """PIL image to a normalised tensor."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.data.transforms_factory import create_transform

    def per_channel(values: Sequence[float]) -> tuple[float, ...]:
        in_chans = input_size[0]
        return tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans

    return create_transform(
        input_size,
        is_training=augment,
        scale=(0.5, 1.0),
        color_jitter=0.0,
        interpolation=config.get("interpolation", "bilinear"),
        mean=per_channel(config.get("mean", IMAGENET_DEFAULT_MEAN)),
        std=per_channel(config.get("std", IMAGENET_DEFAULT_STD)),
        # Small images are used whole.
        crop_pct=config.get("crop_pct", 1.0 if input_size[-1] < 64 else 0.875),
        crop_mode=config.get("crop_mode"),
    )
