"""Store what PyTorch computes from the formula's weights: ``python generate.py``, in an environment with PyTorch.

Made with PyTorch 2.13.0 on a CPU, in float64. Writes ``stored.npz`` beside this file. Per network, of four 32x32
images: the logits in evaluation and in training mode, the loss, and the running statistics of one BatchNorm after the
training pass. Of two 16x16 images: the norm of every tensor of the loss's gradient in training mode, and samples.

A ReLU's input that float32 rounds to the other side of 0 changes the gradients below it by up to 1e-2, in any program,
and among millions of inputs some are always that near. So the gradient's images are few, small, and chosen from several
draws to have none near.
"""

import pathlib

import formula
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        if (inputs, stride) != (outputs, 1):
            self.shortcut_conv, self.shortcut_norm = conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if hasattr(self, "shortcut_conv"):
            x = self.shortcut_norm(self.shortcut_conv(x))
        return F.relu(x + y)


class ResNet18(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(3, 64, 3), nn.BatchNorm2d(64)
        shapes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        shapes += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
        self.blocks = nn.Sequential(*(Basic(*shape) for shape in shapes))
        self.classifier = nn.Linear(512, formula.NUM_CLASSES)

    def forward(self, x):
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        return self.classifier(x.mean((2, 3)))


class PreActivation(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        if inputs != outputs:
            self.shortcut_conv = conv(inputs, outputs, 1, stride)

    def forward(self, x):
        y = F.relu(self.norm1(x))
        shortcut = self.shortcut_conv(y) if hasattr(self, "shortcut_conv") else x
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(y))))


class WRN402(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 16, 3)
        shapes = [(16, 32, 1)] + 5 * [(32, 32, 1)]
        shapes += [(32, 64, 2)] + 5 * [(64, 64, 1)]
        shapes += [(64, 128, 2)] + 5 * [(128, 128, 1)]
        self.blocks = nn.Sequential(*(PreActivation(*shape) for shape in shapes))
        self.norm = nn.BatchNorm2d(128)
        self.classifier = nn.Linear(128, formula.NUM_CLASSES)

    def forward(self, x):
        x = F.relu(self.norm(self.blocks(self.conv(x))))
        return self.classifier(x.mean((2, 3)))


SAMPLED = {
    "resnet18": (
        "conv.weight",
        "norm.weight",
        "blocks.0.conv1.weight",
        "blocks.2.conv1.weight",
        "blocks.2.shortcut_conv.weight",
        "blocks.2.shortcut_norm.bias",
        "blocks.5.norm2.weight",
        "blocks.7.conv2.weight",
        "classifier.weight",
        "classifier.bias",
    ),
    "wrn_40_2": (
        "conv.weight",
        "blocks.0.norm1.weight",
        "blocks.0.shortcut_conv.weight",
        "blocks.6.conv1.weight",
        "blocks.6.shortcut_conv.weight",
        "blocks.9.norm2.bias",
        "blocks.17.conv2.weight",
        "norm.weight",
        "classifier.weight",
        "classifier.bias",
    ),
}


def images_of(name: str, batch: int, side: int) -> torch.Tensor:
    return torch.from_numpy(formula.images(name, batch, side)).permute(0, 3, 1, 2).double()


def training_pass(model, images):
    """Return the logits, the loss and the gradients in training mode."""
    model.train().zero_grad()
    logits = model(images)
    loss = F.cross_entropy(logits, torch.from_numpy(formula.labels(len(images))).long())
    loss.backward()
    gradients = {name: parameter.grad.double().numpy().copy() for name, parameter in model.named_parameters()}
    return logits.detach().numpy(), loss.item(), gradients


def distance_to_kinks(model, images) -> float:
    """Return the smallest distance to 0 of any ReLU's input in training mode."""
    relu, distances = F.relu, []
    try:
        F.relu = lambda x: (distances.append(x.abs().min().item()), relu(x))[1]
        with torch.no_grad():
            model.train()(images)
    finally:
        F.relu = relu
    return min(distances)


def main():
    stored = {}
    for name, create in (("resnet18", ResNet18), ("wrn_40_2", WRN402)):
        model = create()
        weights = {
            key: torch.from_numpy(formula.tensor(key, tuple(value.shape)))
            for key, value in model.state_dict().items()
            if not key.endswith("num_batches_tracked")
        }

        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
        model.double()
        images = images_of("images", 4, 32)
        with torch.no_grad():
            stored[f"{name}/evaluation_logits"] = model.eval()(images).numpy()
        stored[f"{name}/training_logits"], stored[f"{name}/loss"], _ = training_pass(model, images)
        stored[f"{name}/running_mean"] = model.blocks[-1].norm2.running_mean.numpy().copy()
        stored[f"{name}/running_var"] = model.blocks[-1].norm2.running_var.numpy().copy()

        draws = [f"gradient images {draw}" for draw in range(100)]
        chosen = max(draws, key=lambda draw: distance_to_kinks(model, images_of(draw, 2, 16)))
        nearest = distance_to_kinks(model, images_of(chosen, 2, 16))
        _, _, gradients = training_pass(model, images_of(chosen, 2, 16))
        stored[f"{name}/gradient_images"] = np.array(chosen)
        stored[f"{name}/gradient_names"] = np.array(list(gradients))
        stored[f"{name}/gradient_norms"] = np.array([np.linalg.norm(value) for value in gradients.values()])
        for key in SAMPLED[name]:
            value = gradients[key].reshape(-1)
            stored[f"{name}/gradient/{key}"] = value[formula.sample_positions(key, value.size)]
            stored[f"{name}/gradient_max/{key}"] = np.abs(value).max()

        _, _, single = training_pass(model.float(), images_of(chosen, 2, 16).float())
        error = max(np.abs(single[key] - gradients[key]).max() / np.abs(gradients[key]).max() for key in gradients)
        print(f"{name}: {chosen}, nearest input of a ReLU {nearest:.1e}, PyTorch's float32 gradient within {error:.1e}")
    np.savez_compressed(pathlib.Path(__file__).with_name("stored.npz"), **stored)


if __name__ == "__main__":
    main()
