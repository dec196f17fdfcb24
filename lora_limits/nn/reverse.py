"""Refuses forward-mode derivatives in words of this library, wherever they are asked for.

JAX refuses them too, of a function whose derivative is written by hand, but of a jitted one in a
line that names nothing. So arrays pass through an identity before they reach such a function: its
tangents go through a linear operation that can be turned round and batched, and never be run. One
case is left to JAX's own line: jacfwd of a jitted function, which batches before anything is run.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

T = TypeVar("T")


def reverse_only(name: str, tree: T) -> T:
    """The same arrays; TypeError that says `name` where their tangents are to be computed."""
    return jax.tree.map(functools.partial(_same, name), tree)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _same(name: str, x: jax.Array) -> jax.Array:
    del name
    return x


@_same.defjvp
def _tangent(name, primals, tangents):
    return primals[0], _forward.bind(tangents[0], name=name)


def refusal(name: str) -> TypeError:
    """What is said of a forward-mode derivative of `name`."""
    return TypeError(
        f"derivative of {name}: got a forward-mode one (jvp, jacfwd, hessian), "
        "expected reverse-mode ones (grad, vjp, jacrev), or Exact"
    )


def _refuse(*_: Any, name: str, **__: Any):
    raise refusal(name)


_forward = Primitive("forward_mode")
_forward.def_impl(_refuse)
_forward.def_abstract_eval(lambda x, name: x)
ad.deflinear2(_forward, lambda cotangent, x, name: [cotangent])
batching.primitive_batchers[_forward] = lambda args, dims, name: (
    _forward.bind(*args, name=name),
    dims[0],
)
mlir.register_lowering(_forward, lambda context, x, name: _refuse(name=name))
