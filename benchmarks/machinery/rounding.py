"""The same function in another arithmetic: TF32 operands on any device, or float64 throughout.

A function is traced once, and what JAX traced is evaluated again operation by operation, with the operands of
convolutions and matrix products rounded, or with every float32 made a float64, in the bodies of `jax.lax.scan` and
`jax.lax.while_loop` too. A gradient function holds its backward pass in what is traced, so both passes are covered
alike, whatever model or optimizer is inside.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from examples.noisy_images import compilation

TF32_MANTISSA_BITS = 10

_MULTIPLYING = (core.primitives.dot_general_p, core.primitives.conv_general_dilated_p)
# Their parameters hold one function, which is evaluated in their place.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
# They round to float32's bits, or leave this program: nothing that float64 could stand in for.
_TIED_TO_FLOAT32 = ("pure_callback", "reduce_precision")

Evaluate = Callable[[Any, list[jax.Array]], Any]


def to_tf32(x: jax.Array) -> jax.Array:
    """Round float32 to the 10 explicit mantissa bits of TF32, to nearest, ties to even; other dtypes stay."""
    if x.dtype != jnp.float32:
        return x
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=TF32_MANTISSA_BITS)


def with_tf32_operands(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with both operands of every convolution and matrix product rounded to TF32.

    Products and sums stay float32, as in the hardware. This is an emulation: hardware may round otherwise on the way
    in, and adds in an order of its own.
    """

    def evaluate(equation: core.JaxprEqn, operands: list[jax.Array]) -> Any:
        if equation.primitive in _MULTIPLYING:
            operands = [to_tf32(x) for x in operands]
        return equation.primitive.bind(*operands, **equation.params)

    def rounded(*arguments: Any) -> Any:
        closed, shapes = jax.make_jaxpr(compilation.uncompiled(function), return_shape=True)(*arguments)
        results = _evaluate(closed, jax.tree.leaves(arguments), evaluate, lambda x: x)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return rounded


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with every float32 in it, its arguments and its constants a float64 instead.

    It must be called under ``jax.enable_x64()``. Constants keep the value that float32 gave them: it is the same
    function, only its arithmetic is finer. What reads or makes the bits of a number, as taking an exponent and drawing
    at random do, keeps the bits of float32.
    """

    def evaluate(equation: core.JaxprEqn, operands: list[jax.Array]) -> Any:
        name = equation.primitive.name
        if name in _TIED_TO_FLOAT32 and any(_is_float32(v.aval) for v in (*equation.invars, *equation.outvars)):
            raise NotImplementedError(f"{name} of float32 has no counterpart in float64")
        if name == "bitcast_convert_type":
            return _widen(equation.primitive.bind(*map(_narrow, operands), **equation.params))
        if equation.primitive is core.primitives.scatter_add_p:
            # Its parameters hold an addition that is typed; the public function makes it anew.
            return jax.lax.scatter_add(*operands, **_without(equation.params, "update_jaxpr", "update_consts"))
        parameters = {key: _widen_parameter(value) for key, value in equation.params.items()}
        return equation.primitive.bind(*operands, **parameters)

    def wide(*arguments: Any) -> Any:
        with jax.enable_x64(False):
            closed, shapes = jax.make_jaxpr(compilation.uncompiled(function), return_shape=True)(*arguments)
        results = _evaluate(closed, jax.tree.leaves(arguments), evaluate, _widen)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return wide


def _evaluate(closed: Any, arguments: Sequence[Any], evaluate: Evaluate, convert: Callable[[Any], Any]) -> list[Any]:
    jaxpr = closed.jaxpr
    values: dict[core.Var, Any] = {}
    values.update(zip(jaxpr.constvars, map(convert, closed.consts), strict=True))
    values.update(zip(jaxpr.invars, map(convert, arguments), strict=True))

    def read(variable: Any) -> Any:
        return convert(variable.val) if isinstance(variable, core.Literal) else values[variable]

    for equation in jaxpr.eqns:
        operands = [read(variable) for variable in equation.invars]
        if equation.primitive.name in _CALLS:
            results = _evaluate(equation.params[_CALLS[equation.primitive.name]], operands, evaluate, convert)
        elif equation.primitive.name == "scan":
            results = _scan(equation.params, operands, evaluate, convert)
        elif equation.primitive.name == "while":
            results = _while(equation.params, operands, evaluate, convert)
        elif any(inner.primitive in _MULTIPLYING for inner in _inner_equations(equation)):
            raise NotImplementedError(f"a convolution or a matrix product inside {equation.primitive.name}")
        else:
            results = evaluate(equation, operands)
            if not equation.primitive.multiple_results:
                results = [results]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _scan(parameters: dict[str, Any], operands: list[jax.Array], evaluate: Evaluate, convert: Callable) -> list[Any]:
    # Operands are constants, then what is carried, then what is scanned over; results are carried, then stacked.
    first, carried = parameters["num_consts"], parameters["num_carry"]
    constants = operands[:first]

    def body(carry: list[Any], parts: list[Any]) -> tuple[list[Any], list[Any]]:
        results = _evaluate(parameters["jaxpr"], [*constants, *carry, *parts], evaluate, convert)
        return results[:carried], results[carried:]

    initial, stacked = operands[first : first + carried], operands[first + carried :]
    options = {name: parameters[name] for name in ("length", "reverse", "unroll")}
    carry, results = jax.lax.scan(body, initial, stacked, **options)
    return [*carry, *results]


def _while(parameters: dict[str, Any], operands: list[jax.Array], evaluate: Evaluate, convert: Callable) -> list[Any]:
    # Operands are constants of the condition, those of the body, then what is carried.
    first, last = parameters["cond_nconsts"], parameters["cond_nconsts"] + parameters["body_nconsts"]
    of_condition, of_body, initial = operands[:first], operands[first:last], operands[last:]
    return jax.lax.while_loop(
        lambda carry: _evaluate(parameters["cond_jaxpr"], [*of_condition, *carry], evaluate, convert)[0],
        lambda carry: _evaluate(parameters["body_jaxpr"], [*of_body, *carry], evaluate, convert),
        initial,
    )


def _inner_equations(equation: core.JaxprEqn) -> Iterator[core.JaxprEqn]:
    for jaxpr in core.jaxprs_in_params(equation.params):
        for inner in jaxpr.eqns:
            yield inner
            yield from _inner_equations(inner)


def _widen(x: Any) -> Any:
    return jnp.asarray(x, jnp.float64) if _is_float32(x) else x


def _narrow(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype == jnp.float64 else x


def _widen_parameter(value: Any) -> Any:
    return np.dtype(np.float64) if isinstance(value, np.dtype) and value == np.float32 else value


def _is_float32(x: Any) -> bool:
    return getattr(x, "dtype", None) == np.float32


def _without(parameters: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key not in names}
