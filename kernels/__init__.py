"""Device code: array in, array out. Nothing here knows of derivatives or modules.

A kernel is one file of this folder with a module-level `KERNEL` (see README.md). It is
found by itself; nothing else lists it.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable

import jax

from conv_pallas.spec import PLATFORMS, Problem

# Packages that a kernel may need and a user may lack. Any other failed import is a bug.
OPTIONAL_PACKAGES = ("triton", "jax_triton")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One implementation of the three operations.

    Attributes:
      implementation: the name that users select it by.
      platforms: where it can run, of `conv_pallas.spec.PLATFORMS`.
      run: ``run(problem, lhs, rhs) -> array`` of ``problem.out_shape`` and
        ``problem.out_dtype``. Both operands have three axes and no axis of size 0, and no
        tap at either end lies beyond the sequence for every output.
      decline: ``decline(problem) -> reason``, or None where `run` will do it.
      describe: ``describe(problem) -> str``, in a few words how `run` would do it.
      priority: where no implementation is asked for, the highest that does not decline
        wins; None: only when asked for by name. It may be a function of the problem, for a kernel
        that wins here and loses there.
      by_name: ``by_name(problem) -> why``, in a few words, where `priority` gives it none.
      many: ``many(problem) -> f``, where ``f(lhs, rhs) -> array``, all three with one axis more,
        the first, is what a batch of kernels of such a problem is best done by, as `jax.vmap`
        asks for it; None: it is folded into groups.
      fused: ``fused(problem, x, w, bias) -> y``, the forward convolution with
        ``problem.epilogue`` around it; bias is None where there is none. None: the kernel
        has no such thing, and XLA adds bias and activation to what `run` returns.
      decline_fused: as `decline`, for `fused`.
      backward: ``backward(problem, x, w, bias, saved, gy, wanted) -> (dx, dw, db)``, the
        gradients of ``y = activation(z)``, ``z = conv(x, w) + bias``, for the forward
        convolution's problem. ``saved`` is what ``problem.epilogue.saved`` says, y or z of
        ``problem.out_shape``, or None; a kernel that computes z anew from x, w and bias leaves
        it alone, and then XLA never makes it. ``wanted`` is three booleans; a gradient that
        is not wanted is None, as is db without a bias. db is float32 or wider. None: XLA computes
        ``gz = gy * activation'(z)`` and db, and `run` the other two from gz.
      decline_backward: as `decline`, for `backward`; it is also given ``wanted``.
      recomputes: ``recomputes(problem)``, whether `backward` computes z anew.
      packed: ``packed(problem, x, w, bias, sees) -> y``, as `fused`, of packed sequences:
        ``sees (N, T)`` int32 has for each output a bit for each of up to 31 taps, 1 where the
        output sees it; what it does not see counts as zero, NaN too. ``problem.spec`` has one
        output for each step. None: XLA writes what the taps see side by side.
      packed_backward: ``packed_backward(problem, x, w, bias, sees, gy, wanted) -> (dx, dw, db)``,
        its gradients, as of `backward`, but that it makes z anew. Goes with `packed`.
      decline_packed: as `decline`, for both of these.
      packed_wins: ``packed_wins(problem)``, whether these are picked without being asked for where
        `priority` gives none to an operation of one sequence: what they save is more than what XLA
        would be faster by.
      opaque: whether XLA can't look into what these return, as it can't into a custom call. Then it
        is not asked where XLA's partitioner would have to split that.
      keeps: ``keeps(problem)``, whether `fused` returns ``(y, z)``, both of ``problem.out_shape``
        and ``problem.out_dtype``, where ``problem.epilogue.keep`` asks for it. Else it is asked
        for z alone, and XLA makes y of it, in one more pass.

    Raises:
      TypeError: one of these is of another type, told when the file is imported.
      ValueError: the name has a comma or a space in it, which the environment variable can't say;
        or a platform is unknown.
    """

    implementation: str
    platforms: tuple[str, ...]
    run: Callable[[Problem, jax.Array, jax.Array], jax.Array]
    decline: Callable[[Problem], str | None]
    describe: Callable[[Problem], str]
    priority: int | Callable[[Problem], int | None] | None
    by_name: Callable[[Problem], str] = lambda problem: "only when asked for by name"
    many: Callable[[Problem], Callable[..., jax.Array] | None] = lambda problem: None
    fused: Callable[..., jax.Array | tuple[jax.Array, jax.Array]] | None = None
    decline_fused: Callable[[Problem], str | None] = lambda problem: None
    backward: Callable[..., tuple[jax.Array | None, ...]] | None = None
    decline_backward: Callable[[Problem, tuple[bool, bool, bool]], str | None] = (
        lambda problem, wanted: None
    )
    recomputes: Callable[[Problem], bool] = lambda problem: False
    packed: Callable[..., jax.Array] | None = None
    packed_backward: Callable[..., tuple[jax.Array | None, ...]] | None = None
    decline_packed: Callable[[Problem], str | None] = lambda problem: None
    packed_wins: Callable[[Problem], bool] = lambda problem: False
    keeps: Callable[[Problem], bool] = lambda problem: False
    opaque: bool = False

    def __post_init__(self):
        name, platforms = self.implementation, self.platforms
        if not isinstance(name, str):
            raise TypeError(f"implementation of a Kernel must be a name, got {name!r}")
        if not name or "," in name or name != "".join(name.split()):
            raise ValueError(
                f"implementation of a Kernel must be a name without commas and spaces, got {name!r}"
            )
        what = f"of the kernel {name!r}"
        if not isinstance(platforms, tuple):
            raise TypeError(f"platforms {what} must be a tuple of names, got {platforms!r}")
        if not platforms or not set(platforms) <= set(PLATFORMS):
            known = ", ".join(PLATFORMS)
            raise ValueError(f"platforms {what} must be some of {known}, got {platforms!r}")
        if not (self.priority is None or isinstance(self.priority, int) or callable(self.priority)):
            raise TypeError(
                f"priority {what} must be None, an int or a function, got {self.priority!r}"
            )
        for field in dataclasses.fields(self):
            hook = getattr(self, field.name)
            if field.name in _OTHER_THAN_HOOKS or (hook is None and field.default is None):
                continue
            if not callable(hook):
                raise TypeError(f"{field.name} {what} must be a function, got {hook!r}")
        if (self.packed is None) != (self.packed_backward is None):
            raise TypeError(f"packed and packed_backward {what} go together, and only one is there")

    def rank(self, problem: Problem) -> int | None:
        """The priority for one problem that it does not decline."""
        return self.priority(problem) if callable(self.priority) else self.priority


_OTHER_THAN_HOOKS = ("implementation", "platforms", "priority", "opaque")


@functools.cache
def discover() -> tuple[dict[str, Kernel], dict[str, str]]:
    """All kernels by module name, and for each that can't be imported here the reason."""
    found, missing = {}, {}
    for module in pkgutil.iter_modules(__path__):
        try:
            kernel = getattr(importlib.import_module(f"{__name__}.{module.name}"), "KERNEL", None)
        except ModuleNotFoundError as e:
            if e.name is None or e.name.split(".")[0] not in OPTIONAL_PACKAGES:
                raise
            missing[module.name] = f"needs the package {e.name}, which is not installed"
            continue
        if kernel is not None and not isinstance(kernel, Kernel):
            raise TypeError(f"KERNEL of {module.name}.py must be a Kernel, got {kernel!r}")
        if kernel is not None:
            found[module.name] = kernel
    return found, missing
