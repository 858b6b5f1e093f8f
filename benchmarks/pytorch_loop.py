"""Whole training runs in PyTorch by the conventions of the released SANER code: a loop, its optimizers, its network.

Where that code and the papers differ, this is the code: the perturbation is ``rho g / (||g|| + 1e-12)``, an element is
down-weighted where ``0 < h / (g + 1e-8) < 1``, weight decay and momentum are PyTorch's SGD on what is left, alpha rises
once an epoch, and BatchNorm's running statistics are those of the pass at ``w + eps``. No augmentation. Imported by
`whole_runs` alone: it needs PyTorch.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.machinery.sides.pytorch import ResNet18
from examples.noisy_images import data
from examples.noisy_images.config import Config
from examples.noisy_images.measures import metrics

EVALUATION_BATCH = 500


def train(config: Config, dataset: data.Dataset) -> list[dict[str, Any]]:
    """Train SGD, SAM or SANER as a configuration says and return the metrics of every epoch, named as the program's."""
    torch.manual_seed(config.seed)
    network = initialised(ResNet18(config.network.width, dataset.num_classes))
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(
        parameters,
        lr=config.optimizer.learning_rate,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
    )
    epochs = config.training.epochs
    drops = [max(round(share * epochs), 1) for share in config.optimizer.learning_rate_drops]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
    train_images, test_images = (inputs(split, dataset) for split in (dataset.train, dataset.test))
    labels = torch.from_numpy(np.asarray(dataset.train.labels)).long()
    size, ramp = config.training.batch_size, round(config.alpha_ramp_epochs)
    history = []
    for epoch in range(1, epochs + 1):
        alpha = config.optimizer.alpha * (min(epoch / ramp, 1) if ramp else 1)
        network.train()
        # The last short batch is left out.
        for batch in torch.randperm(len(labels))[: len(labels) // size * size].view(-1, size):

            def backward(batch: torch.Tensor = batch) -> None:
                F.cross_entropy(network(train_images[batch]), labels[batch]).backward()

            take_step(config.optimizer.method, network, optimizer, backward, config.optimizer.rho, alpha)
        schedule.step()
        predictions, losses = evaluate(network, test_images, dataset.test.labels)
        record = {"epoch": epoch, "test_accuracy": float((predictions == dataset.test.labels).mean())}
        if epoch == epochs:
            predictions, losses = evaluate(network, train_images, dataset.train.labels)
            record |= metrics.on_training_set(predictions, losses, dataset.train.labels, dataset.train.clean_labels)
        history.append(record)
    return history


def take_step(
    method: str,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[], None],
    rho: float | None,
    alpha: float,
) -> None:
    """Take one step; ``backward`` adds the gradient of the batch's mean loss to that of the parameters."""
    parameters = list(network.parameters())
    optimizer.zero_grad()
    if method == "sgd":
        backward()
        optimizer.step()
        return
    with statistics_kept(network):
        backward()
    unperturbed = [p.grad.clone() for p in parameters]
    norm = torch.stack([g.norm() for g in unperturbed]).norm()
    perturbation = [rho * g / (norm + 1e-12) for g in unperturbed]
    move(parameters, perturbation, 1)
    optimizer.zero_grad()
    backward()
    move(parameters, perturbation, -1)
    if method == "saner":
        for p, g in zip(parameters, unperturbed, strict=True):
            ratio = p.grad / (g + 1e-8)
            p.grad[(ratio > 0) & (ratio < 1)] *= 1 - alpha
    optimizer.step()


@torch.no_grad()
def move(parameters: Sequence[torch.Tensor], by: Sequence[torch.Tensor], sign: int) -> None:
    """Move the parameters, in place."""
    for p, e in zip(parameters, by, strict=True):
        p.add_(e, alpha=sign)


@contextlib.contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Leave the running statistics as they are in what is computed inside."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def initialised(network: nn.Module) -> nn.Module:
    """Draw the kernels of convolutions Kaiming-normal over what goes out; all else is PyTorch's own initialisation."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def inputs(split: data.Split, dataset: data.Dataset) -> torch.Tensor:
    """Return the normalised images of a split, float32 (N, C, H, W)."""
    mean, std = np.asarray(dataset.mean, np.float32), np.asarray(dataset.std, np.float32)
    scaled = (np.asarray(split.images, np.float32) / 255 - mean) / std
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))


@torch.no_grad()
def evaluate(network: nn.Module, images: torch.Tensor, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return predicted labels and losses against given labels, (N,) each, in evaluation mode."""
    network.eval()
    logits = torch.cat([network(part) for part in images.split(EVALUATION_BATCH)])
    losses = F.cross_entropy(logits, torch.from_numpy(np.asarray(labels)).long(), reduction="none")
    return logits.argmax(1).numpy(), losses.numpy()
