"""The same ResNet left in training mode: each image is normalised by the statistics of whatever shares its batch."""

from forwards import resnet

__all__ = ["make"]


def make(seed=0):
    module, variables = resnet.make(seed)

    def forward(variables, images):
        return module.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    return forward, variables
