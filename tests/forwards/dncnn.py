"""DnCNN (Zhang et al. 2016, arXiv:1608.03981) in linen: the noise predicted by a stack of convolution, BatchNorm and
ReLU, and taken from the image."""

import flax.linen as nn

from forwards import weights

DEPTH, FILTERS = 5, 12


class DnCNN(nn.Module):
    @nn.compact
    def __call__(self, noisy, train=False):
        h = nn.relu(nn.Conv(FILTERS, (3, 3))(noisy))
        for _ in range(DEPTH - 2):
            h = nn.Conv(FILTERS, (3, 3), padding="CIRCULAR", use_bias=False)(h)
            h = nn.relu(nn.BatchNorm(use_running_average=not train, epsilon=1e-5)(h))
        return noisy - nn.Conv(noisy.shape[-1], (3, 3))(h)


def make(seed=0):
    module = DnCNN()
    return module, weights.init(module, ((1, 12, 12, 1), "float32"), seed=seed)
