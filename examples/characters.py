"""A model of the characters of a text, which then writes some of its own.

    python examples/characters.py --text FILE

Any text file will do; its last tenth is the test. What is measured are bits a character. To write,
the model is streamed: each step reads one character, through `compiled_step`, and costs the same
however long the text has become.

Expected: it depends on the text. Seen with 488,000 characters of Markdown and Python: 2.35 bits
after 400 steps (two CPU cores, seed 0, 7 minutes beside other work), and lines that look like
Python. The TCN paper (Bai, Kolter and Koltun 2018, arXiv:1803.01271) has 1.31 bits a
character on the Penn Treebank and 1.45 on text8.
"""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import conv_class, existing_file, optimizer, parser, plot, positive, train
from flax import nnx

from conv_pallas.nn import TCN, compiled_step, replace_convs


def loss_of(model, text):
    """Nats a character, for ``(N, T + 1)`` indices."""
    logits = model(jax.nn.one_hot(text[:, :-1], model.in_channels))
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


@nnx.jit
def update(model, optimizer, text):
    loss, grads = nnx.value_and_grad(loss_of)(model, text)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def evaluate(model, text):
    return loss_of(model, text)


def write(model, start, length, temperature, seed):
    """``length`` more characters after ``start``, as indices."""
    model.eval()
    step, state = compiled_step(model), model.init_state(1)
    rng = np.random.default_rng(seed)
    one_hot = np.eye(model.in_channels, dtype=np.float32)
    logits, state = step(jnp.asarray(one_hot[start][None]), state)  # all at once
    written = []
    for _ in range(length):
        gumbel = rng.gumbel(size=model.in_channels)
        written.append(int(np.argmax(np.asarray(logits[0, -1]) / temperature + gumbel)))
        logits, state = step(jnp.asarray(one_hot[written[-1:]][None]), state)
    return written


def main(arguments=None):
    options = parser(__doc__, steps=400, batch=16, learning_rate=4e-3)
    options.add_argument("--text", type=existing_file, required=True, help="a text file")
    options.add_argument("--time", type=positive, default=256, help="characters of a sequence")
    options.add_argument("--hidden", type=positive, default=96, help="channels")
    options.add_argument("--levels", type=positive, default=5, help="blocks")
    options.add_argument("--taps", type=positive, default=3, help="kernel size")
    options.add_argument("--write", type=int, default=400, help="characters to write at the end")
    options.add_argument("--temperature", type=float, default=0.7, help="below 1: safer choices")
    options = options.parse_args(arguments)
    text = options.text.read_text(encoding="utf-8", errors="replace")
    alphabet = sorted(set(text))
    indices = np.asarray([alphabet.index(c) for c in text], np.int32)
    split, window = len(indices) * 9 // 10, options.time + 1
    if len(indices) - split < window:
        sys.exit(f"{options.text} is too short: the test needs {window} characters")
    model = TCN(
        len(alphabet), [options.hidden] * options.levels, len(alphabet), options.taps, 0.1,
        nnx.Rngs(options.seed), conv=conv_class(options),
    )  # fmt: skip
    adam = optimizer(model, options)
    rng = np.random.default_rng(options.seed)
    rows = min(64, (len(indices) - split) // window)
    held_out = indices[split : split + rows * window].reshape(rows, window)

    def draw(step):
        starts = rng.integers(0, split - window + 1, options.batch)
        return indices[starts[:, None] + np.arange(window)]

    def test():
        model.eval()
        bits = float(evaluate(model, held_out)) / math.log(2)
        model.train()
        return bits

    history = train(
        lambda batch: update(model, adam, batch), draw, test, options, "test bits a character"
    )
    plot(history, "characters", "test bits a character", options)
    written = write(
        replace_convs(model), held_out[0, :64], options.write, options.temperature, options.seed
    )
    print("".join(alphabet[i] for i in [*held_out[0, :64], *written]))
    return history.tests[-1][1]


if __name__ == "__main__":
    main()
