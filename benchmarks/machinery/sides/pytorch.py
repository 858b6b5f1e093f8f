"""The training step in PyTorch, as well tuned as we know: what a PyTorch user would run instead.

ResNet-18 of the same form, channels-last, bfloat16 autocast on request, `torch.compile` where it works, uint8 images on
the device with the same augmentation, SGD in one fused kernel, SAM of the `pytorch-optimizer` package, and SANER's mask
on top of it. BatchNorm's running statistics are those of the pass at the unperturbed weights, as in the training
program. Imported by the worker of `peers` alone: it needs PyTorch.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.machinery.sides.problem import Problem


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Build a convolution without bias, padded to keep the size."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.projects = (inputs, stride) != (outputs, 1)
        if self.projects:
            self.shortcut_conv, self.shortcut_norm = conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (self.shortcut_norm(self.shortcut_conv(x)) if self.projects else x))


class ResNet18(nn.Module):
    """ResNet-18 in CIFAR form, its tensors named as in the training program."""

    def __init__(self, width: float, num_classes: int):
        super().__init__()
        channels = [round(features * width) for features in (64, 128, 256, 512)]
        self.conv, self.norm = conv(3, channels[0], 3), nn.BatchNorm2d(channels[0])
        blocks, inputs = [], channels[0]
        for stage, outputs in enumerate(channels):
            for block in range(2):
                blocks.append(BasicBlock(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


class Peer:
    """What the worker drives: one network, optimizer and step for each method."""

    packages = ("torch", "pytorch-optimizer")

    def __init__(self, problem: Problem):
        self._problem = problem
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = torch.float64 if problem.precision == "float64" else torch.float32
        # float32 is float32 unless TF32 is asked for.
        allowed = problem.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        torch.backends.cudnn.benchmark = True
        images, labels = problem.data()
        self._images = torch.from_numpy(images).permute(0, 3, 1, 2).to(self._device)
        self._labels = torch.from_numpy(labels).long().to(self._device)
        self._mean, self._std = (
            torch.tensor(values, dtype=self._dtype, device=self._device).view(1, 3, 1, 1)
            for values in (problem.mean, problem.std)
        )
        self._inputs: Callable[[torch.Tensor], torch.Tensor] = self._augmented
        self._reweight: Callable[..., Any] = _downweight
        if problem.compile:
            self._inputs = torch.compile(self._augmented)
            self._reweight = torch.compile(_downweight)
        self._steps: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    def describe(self) -> dict[str, Any]:
        """Return what this side runs."""
        name = (
            torch.cuda.get_device_name() if self._device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        )
        return {"device": name, "torch": torch.__version__, "compiled": self._problem.compile}

    def prepare(self, method: str) -> None:
        """Build the step of a method."""
        self._steps[method] = self._step(self._network(), method)[0]

    def run(self, method: str, steps: int) -> None:
        """Take steps and wait for them."""
        step, size = self._steps[method], self._problem.batch_size
        order = torch.randperm(len(self._images), device=self._device)
        for position in range(steps):
            start = position * size % (len(order) - size + 1)
            step(order[start : start + size])
        self._wait()

    def one_step(self, method: str, before: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Take one step on the first batch from given tensors; return the tensors after it, and the loss."""
        network = self._network()
        tensors = {name: torch.from_numpy(array) for name, array in before.items()}
        missing, unexpected = network.load_state_dict(tensors, strict=False)
        if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
            raise ValueError(f"the networks differ: missing {missing}, unexpected {unexpected}")
        step, _ = self._step(network, method)
        loss = step(torch.arange(self._problem.batch_size, device=self._device))
        self._wait()
        after = {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items() if name in before}
        return after | {"loss": loss.detach().cpu().numpy()}

    def _network(self) -> ResNet18:
        network = ResNet18(self._problem.width, self._problem.num_classes)
        return network.to(self._device, self._dtype, memory_format=torch.channels_last).train()

    def _step(self, network: ResNet18, method: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], Any]:
        problem = self._problem
        parameters = list(network.parameters())
        statistics = [b for name, b in network.named_buffers() if not name.endswith("num_batches_tracked")]
        options = {"lr": problem.learning_rate, "momentum": problem.momentum, "weight_decay": problem.weight_decay}
        forward = torch.compile(network) if problem.compile else network
        if method == "sgd":
            optimizer: Any = torch.optim.SGD(parameters, fused=True, **options)
        else:
            from pytorch_optimizer import SAM

            optimizer = SAM(parameters, torch.optim.SGD, rho=problem.rho, fused=True, **options)

        def backward(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with self._autocast():
                logits = forward(inputs)
            loss = F.cross_entropy(logits.to(self._dtype), labels)
            loss.backward()
            return loss

        def step(positions: torch.Tensor) -> torch.Tensor:
            inputs, labels = self._inputs(self._images[positions]), self._labels[positions]
            optimizer.zero_grad(set_to_none=True)
            loss = backward(inputs, labels)
            if method == "sgd":
                optimizer.step()
                return loss
            unperturbed = [p.grad for p in parameters]
            kept = [buffer.clone() for buffer in statistics]
            # Forgets the gradients without writing over them.
            optimizer.first_step(zero_grad=True)
            backward(inputs, labels)
            torch._foreach_copy_(statistics, kept)
            if method == "saner":
                self._reweight([p.grad for p in parameters], unperturbed, problem.alpha)
            optimizer.second_step()
            return loss

        return step, optimizer

    def _augmented(self, images: torch.Tensor) -> torch.Tensor:
        """Crop with black padding, flip and normalise: uint8 (B, C, H, W) to the network's dtype, channels last."""
        problem, (count, _, height, width) = self._problem, images.shape
        if problem.crop_padding:
            padded = F.pad(images, (problem.crop_padding,) * 4)
            top, left = torch.randint(2 * problem.crop_padding + 1, (2, count, 1), device=images.device)
            rows = top + torch.arange(height, device=images.device)
            columns = left + torch.arange(width, device=images.device)
            batch = torch.arange(count, device=images.device)[:, None, None]
            images = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if problem.flip:
            mirrored = torch.rand((count, 1, 1, 1), device=images.device) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        scaled = (images.to(self._dtype) / 255 - self._mean) / self._std
        return scaled.contiguous(memory_format=torch.channels_last)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self._problem.precision != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


@torch.no_grad()
def _downweight(perturbed: list[torch.Tensor], unperturbed: list[torch.Tensor], alpha: float) -> None:
    """Multiply the elements with ``0 < h / g < 1`` by ``1 - alpha``, in place."""
    for h, g in zip(perturbed, unperturbed, strict=True):
        between = ((h > 0) & (h < g)) | ((h < 0) & (h > g))
        h.copy_(torch.where(between, (1 - alpha) * h, h))
