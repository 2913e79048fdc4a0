"""Thirty-two integer lanes for numba: the few vector operations that the resampler is made of.

numba vectorises loops only where LLVM's heuristics agree, and it wraps every slice in reference
counting; written out, the inner loops of `resample` are five times faster and compile sooner. The
operations are plain LLVM vector code, which LLVM turns into what the CPU at hand has. They are exact
integer arithmetic, so every CPU gives the same pixels.

Memory is given by address: the caller answers for `LANES` readable or writable bytes there.
"""

from collections.abc import Callable
from typing import Any, cast

import numba.extending
from llvmlite import ir
from numba import types
from numba.extending import models, register_model

LANES = 32
TILE = 16  # side of the square of bytes that `transpose` moves

# What the decorator returns is called without the typing context: its own annotation says otherwise.
intrinsic = cast(Callable[[Any], Callable[..., Any]], numba.extending.intrinsic)

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_BYTES = ir.VectorType(_I8, LANES)
_SHORTS = ir.VectorType(_I16, LANES)
_INTS = ir.VectorType(_I32, LANES)
_ROW = ir.VectorType(_I8, TILE)


class _Lanes(types.Type):
    def __init__(self, bits: int) -> None:
        super().__init__(name=f"int{bits}x{LANES}")
        self.vector = ir.VectorType(ir.IntType(bits), LANES)


_lanes, _wide_lanes = _Lanes(16), _Lanes(32)


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, numba_type.vector)


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """Return an address as the untyped pointer that `numba.carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.intp), generate


@intrinsic
def filled(typing_context: Any, value: Any) -> Any:
    """Return lanes that all hold `value` (its low 16 bits)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, builder.trunc(args[0], _I16), _SHORTS)

    return _lanes(types.intp), generate


@intrinsic
def filled_wide(typing_context: Any, value: Any) -> Any:
    """Return lanes of 32 bits that all hold `value` (its low 32 bits)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, builder.trunc(args[0], _I32), _INTS)

    return _wide_lanes(types.intp), generate


@intrinsic
def add_product(typing_context: Any, lanes: Any, address: Any, weight: Any) -> Any:
    """Return lanes + signed bytes at `address` * the int16 at `weight` / 256, rounded down."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes, address, weight = args
        # The high half of a product of 16-bit numbers is one instruction: hence the bytes times 256.
        pixels = builder.shl(_load_bytes(builder, address, _SHORTS), _constant(_SHORTS, 8))
        weights = builder.sext(_load_weights(builder, weight, _SHORTS), _INTS)
        product = builder.mul(builder.sext(pixels, _INTS), weights)
        high = builder.trunc(builder.ashr(product, _constant(_INTS, 16)), _SHORTS)
        return builder.add(lanes, high)

    return _lanes(_lanes, types.intp, types.intp), generate


@intrinsic
def add_product_wide(typing_context: Any, lanes: Any, address: Any, weight: Any) -> Any:
    """Return wide lanes + signed bytes at `address` * the int16 at `weight`, exactly."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes, address, weight = args
        weights = _load_weights(builder, weight, _INTS)
        return builder.add(lanes, builder.mul(_load_bytes(builder, address, _INTS), weights))

    return _wide_lanes(_wide_lanes, types.intp, types.intp), generate


@intrinsic
def narrowed(typing_context: Any, lanes: Any) -> Any:
    """Return wide lanes / 256, rounded down, as lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.trunc(builder.ashr(args[0], _constant(_INTS, 8)), _SHORTS)

    return _lanes(_wide_lanes), generate


@intrinsic
def store_signed(typing_context: Any, address: Any, lanes: Any, shift: Any) -> Any:
    """Write lanes >> shift, saturated to signed bytes, at `address`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, lanes, shift = args
        builder.store(_narrow(builder, lanes, shift), _pointer(builder, address, _BYTES), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, _lanes, types.intp), generate


@intrinsic
def store_pixels(typing_context: Any, address: Any, lanes: Any, shift: Any) -> Any:
    """Write (lanes >> shift) + 128, saturated to unsigned bytes, at `address`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, lanes, shift = args
        pixels = builder.xor(_narrow(builder, lanes, shift), _constant(_BYTES, -128))
        builder.store(pixels, _pointer(builder, address, _BYTES), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, _lanes, types.intp), generate


def _transpose(centre: bool) -> Any:
    @intrinsic
    def transpose(
        typing_context: Any, source: Any, source_pitch: Any, target: Any, target_pitch: Any
    ) -> Any:
        """Write the bytes of a 16 x 16 square, rows at distance `pitch`, with its axes exchanged."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, source_pitch, target, target_pitch = args
            rows = [
                builder.load(_pointer(builder, address, _ROW), align=1)
                for address in _rows(builder, source, source_pitch)
            ]
            if centre:
                rows = [builder.xor(row, _constant(_ROW, -128, TILE)) for row in rows]
            # Interleaving rows i and i + 8 rotates the eight bits of (row, column) by one; after
            # four rounds row and column have changed places.
            for _ in range(4):
                rows = [
                    builder.shuffle_vector(rows[i], rows[i + TILE // 2], half)
                    for i in range(TILE // 2)
                    for half in _INTERLEAVE
                ]
            for address, row in zip(_rows(builder, target, target_pitch), rows, strict=True):
                builder.store(row, _pointer(builder, address, _ROW), align=1)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp, types.intp), generate

    return transpose


_INTERLEAVE = [
    ir.Constant(ir.VectorType(_I32, TILE), [i for k in half for i in (k, TILE + k)])
    for half in (range(TILE // 2), range(TILE // 2, TILE))
]
transpose = _transpose(centre=False)
transpose_centred = _transpose(centre=True)  # and subtracts 128: pixels become signed bytes


def _rows(builder: Any, address: Any, pitch: Any) -> list[Any]:
    return [
        builder.add(address, builder.mul(pitch, ir.Constant(pitch.type, i))) for i in range(TILE)
    ]


def _pointer(builder: Any, address: Any, vector: ir.VectorType) -> Any:
    return builder.inttoptr(address, vector.as_pointer())


def _constant(vector: ir.VectorType, value: int, lanes: int = LANES) -> ir.Constant:
    return ir.Constant(vector, [value] * lanes)


def _splat(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _constant(_INTS, 0))


def _load_bytes(builder: Any, address: Any, vector: ir.VectorType) -> Any:
    return builder.sext(builder.load(_pointer(builder, address, _BYTES), align=1), vector)


def _load_weights(builder: Any, address: Any, vector: ir.VectorType) -> Any:
    weight = builder.load(builder.inttoptr(address, _I16.as_pointer()), align=2)
    if vector is _INTS:
        weight = builder.sext(weight, _I32)
    return _splat(builder, weight, vector)


def _narrow(builder: Any, lanes: Any, shift: Any) -> Any:
    shifted = builder.ashr(lanes, _splat(builder, builder.trunc(shift, _I16), _SHORTS))
    low, high = _constant(_SHORTS, -128), _constant(_SHORTS, 127)
    shifted = builder.select(builder.icmp_signed("<", shifted, low), low, shifted)
    shifted = builder.select(builder.icmp_signed(">", shifted, high), high, shifted)
    return builder.trunc(shifted, _BYTES)
