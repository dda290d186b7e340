"""The Numba side: how an instruction becomes inline PTX.  Nothing else in ``ptx/`` knows Numba.

Where numba-cuda is missing, or is told to simulate (``NUMBA_ENABLE_CUDASIM=1``), the names that
kernels need stand for themselves: kernels are then plain functions, which the emulator runs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cuda_kernels.ptx.scalars import SCALARS

if TYPE_CHECKING:
    from cuda_kernels.ptx.instruction import Instruction


def _numba_compiles() -> bool:
    try:
        if find_spec("numba_cuda") is None:
            return False
        from numba import config
    except ImportError:
        return False

    return not config.ENABLE_CUDASIM


COMPILES = _numba_compiles()
"""Whether kernels can be compiled here (which needs no GPU)."""


class KernelSource:
    """A kernel or device function where nothing compiles it: its source, for the emulator."""

    def __init__(self, py_func: Callable[..., Any]) -> None:
        self.py_func = py_func
        self.__name__ = py_func.__name__
        self.__doc__ = py_func.__doc__

    def __getitem__(self, configuration: Any) -> Any:
        raise RuntimeError(
            f"{self.__name__} cannot be launched: numba-cuda is not installed, or is told to "
            "simulate; cuda_kernels.emulator.emulate runs it on the CPU"
        )

    def __call__(self, *args: Any) -> Any:
        """Call a device function as Python."""
        return self.py_func(*args)


class SourceOnlyCuda:
    """Stands for ``numba.cuda`` in kernels that only the emulator will run."""

    @staticmethod
    def jit(function: Any = None, **options: Any) -> Any:
        """Keep the source and ignore the options."""
        return KernelSource(function) if callable(function) else KernelSource

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(f"cuda.{name} has a meaning only while a kernel runs")


if COMPILES:
    import llvmlite.ir as ir
    from numba import cuda
    from numba.cuda import cgutils, types
    from numba.cuda.core.targetconfig import ConfigStack
    from numba.cuda.extending import core_models, register_model
    from numba.cuda.typing.templates import infer, infer_global, make_intrinsic_template

    int32, int64 = types.int32, types.int64
    uint8, uint16, uint32, uint64 = types.uint8, types.uint16, types.uint32, types.uint64
    float16, float32, float64 = types.float16, types.float32, types.float64
else:
    cuda = SourceOnlyCuda()
    int32, int64 = SCALARS["int32"], SCALARS["int64"]
    uint8, uint16, uint32, uint64 = (SCALARS[f"uint{bits}"] for bits in (8, 16, 32, 64))
    float16, float32, float64 = (SCALARS[f"float{bits}"] for bits in (16, 32, 64))


TENSOR_MAP: Any = None
"""Numba's type of a tensor map that a kernel takes by value; None where nothing compiles."""

if COMPILES:

    class TensorMapType(types.Type):
        """128 bytes that only the TMA unit reads."""

        def __init__(self) -> None:
            super().__init__(name="tensor_map")

    _TENSOR_MAP_BYTES = ir.ArrayType(ir.IntType(64), 16)

    @register_model(TensorMapType)
    class _TensorMapModel(core_models.PrimitiveModel):
        def __init__(self, manager: Any, kind: Any) -> None:
            super().__init__(manager, kind, ir.PointerType(_TENSOR_MAP_BYTES))

    class _ByValue(ir.values.ArgumentAttributes):
        """Attributes of a parameter that lies in constant memory as a whole."""

        named = False  # whether LLVM wants the type too: not NVVM's dialect up to Hopper

        def _to_list(self, kind: Any) -> list[str]:
            return [f"byval({kind.pointee})" if self.named else "byval", "align 64"]

    TENSOR_MAP = TensorMapType()


def device_function(function: Callable[..., Any]) -> Any:
    """Make a function that kernels call: inlined, so that register tiles stay in registers."""
    if not COMPILES:
        return KernelSource(function)
    return cuda.jit(function, device=True, inline="always")


def register_instruction(
    made: Instruction, *, memory: bool, volatile: bool, error: type[Exception]
) -> None:
    """Teach Numba the types and the code of an instruction."""
    if not COMPILES:
        return

    def typing(context: Any, *args: Any) -> Any:
        if len(args) != len(made.parameters):
            raise error(
                f"{made.__name__} takes {len(made.parameters)} arguments "
                f"({', '.join(made.parameters)}), got {len(args)}"
            )
        literals = {
            name: argument.literal_value
            for name, argument in zip(made.parameters, args, strict=True)
            if isinstance(argument, types.IntegerLiteral)
        }
        try:
            operands = made.operands(literals)
            text = made.assembly(literals)
        except KeyError as missing:
            raise error(_not_literal(made, missing.args[0])) from None
        except ValueError as reason:
            raise error(f"{made.__name__}: {reason}") from None
        results = [_scalar(operand.letter) for operand in operands if operand.returned]
        taken = [operand for operand in operands if not operand.returned]
        accepted = [
            _accept(made, name, operand, argument, error)
            for name, operand, argument in zip(made.parameters, taken, args, strict=True)
        ]
        signature = _return_type(results)(*accepted)

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            _check_target(made, error)  # not while typing, of which Numba keeps the result
            return _emit(context, builder, signature, values, operands, text, memory, volatile)

        return signature, code

    _register(made, typing, ["context", *made.parameters])


def register_address(made: Instruction, space: str, *, error: type[Exception]) -> None:
    """Teach Numba to take the address of an array element."""
    if not COMPILES:
        return

    def typing(context: Any, array: Any, index: Any) -> Any:
        if not isinstance(array, types.Array):
            raise error(f"{made.__name__}: the first argument must be an array, got {array}")
        entries = tuple(index) if isinstance(index, types.BaseTuple) else (index,)
        if len(entries) != array.ndim or not all(isinstance(e, types.Integer) for e in entries):
            raise error(f"{made.__name__}: the index must be {array.ndim} integer(s), got {index}")
        wanted = types.UniTuple(types.intp, array.ndim)
        if not isinstance(index, types.BaseTuple):
            wanted = types.intp
        result = types.uint32 if space == "shared" else types.uint64

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            view = context.make_array(signature.args[0])(context, builder, value=values[0])
            indices = [values[1]]
            if isinstance(signature.args[1], types.BaseTuple):
                indices = cgutils.unpack_tuple(builder, values[1])
            pointer = cgutils.get_item_pointer(
                context, builder, signature.args[0], view, indices, wraparound=False
            )
            if space == "shared":
                pointer = builder.addrspacecast(pointer, pointer.type.pointee.as_pointer(3))
            return builder.ptrtoint(pointer, context.get_value_type(result))

        return result(array, wanted), code

    _register(made, typing, ["context", *made.parameters])


def _register(made: Instruction, typing: Callable[..., Any], parameters: list[str]) -> None:
    typing.__name__ = made.__name__
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typing.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in parameters]
    )
    # Literals first: an instruction that needs one says so by name, not "no match".
    template = make_intrinsic_template(
        made, typing, made.__name__, prefer_literal=True, kwargs={"target": "cuda"}
    )
    infer(template)
    infer_global(made, types.Function(template))


def _architecture() -> tuple[Any, ...] | None:
    flags = ConfigStack.top_or_none()
    if flags is None or not flags.is_set("compute_capability"):
        return None
    return tuple(flags.compute_capability)


def live_at_entry(
    cfg: Any, blocks: Any, used: dict[Any, set[str]], defined: dict[Any, set[str]]
) -> dict[Any, set[str]]:
    """Find the variables that are alive where each block begins, as Numba's function does.

    Numba's sweeps over the blocks as a dictionary holds them, which after inlining is no order of
    control flow: that took a third of its time on a large kernel.
    """
    flow = [block for block in cfg.topo_order() if block in defined]
    order = [*flow, *(defined.keys() - set(flow))]
    bit = {name: 1 << i for i, name in enumerate(set().union(*defined.values(), *used.values()))}
    reachable = {block: sum(map(bit.get, defined[block] | used[block])) for block in defined}
    live = {block: set(used[block]) for block in blocks}
    grown = True
    while grown:  # what is defined or used on some way to a block
        grown = False
        for block in order:
            for after, _ in cfg.successors(block):
                before = reachable[after]
                reachable[after] |= reachable[block]
                grown |= reachable[after] != before
    grown = True
    while grown:
        grown = False
        for block in reversed(order):
            for earlier, _ in cfg.predecessors(block):
                more = live[block] - defined[earlier] - live[earlier]
                more = {name for name in more if bit[name] & reachable[earlier]}
                live[earlier] |= more
                grown |= bool(more)
    return live


@contextmanager
def quicker_liveness() -> Iterator[None]:
    """Let Numba use :func:`live_at_entry` while it compiles a kernel of ours."""
    from numba.cuda.core import analysis

    theirs = analysis.compute_live_map
    analysis.compute_live_map = live_at_entry
    try:
        yield
    finally:
        analysis.compute_live_map = theirs


USED: set[Instruction] = set()
"""Instructions in what was compiled since someone emptied it."""


def why_not_on(made: Instruction, architecture: tuple[Any, ...]) -> str | None:
    """Say why an architecture has not got an instruction; None if it has."""
    if made.target.has(architecture):
        return None
    name = f"sm_{''.join(str(part) for part in architecture)}"
    return f"{made.__name__} needs {made.target}; this kernel is compiled for {name}"


def _check_target(made: Instruction, error: type[Exception]) -> None:
    USED.add(made)
    architecture = _architecture()
    if architecture is not None and (reason := why_not_on(made, architecture)):
        raise error(reason)


def _not_literal(made: Instruction, name: str) -> str:
    return f"{made.__name__}: {name} must be known when the kernel is compiled: an integer literal"


def _scalar(letter: str) -> Any:
    return {"f": float32, "d": float64, "h": uint16, "r": uint32, "l": uint64}[letter]


def _accept(
    made: Instruction, name: str, operand: Any, argument: Any, error: type[Exception]
) -> Any:
    if operand.literal:
        if not isinstance(argument, types.IntegerLiteral):
            raise error(_not_literal(made, name))
        return argument
    if operand.letter == "t":
        if argument != TENSOR_MAP:
            raise error(f"{made.__name__}: {name} must be a tensor map, got {argument}")
        return argument
    wanted = _scalar(operand.letter)
    if operand.count is None:
        kinds = types.Float if operand.letter in "fd" else (types.Integer, types.Boolean)
        if not isinstance(argument, kinds):
            article = "a float" if operand.letter in "fd" else "an integer"
            raise error(f"{made.__name__}: {name} must be {article}, got {argument}")
        return wanted
    if not (
        isinstance(argument, types.Array) and argument.layout == "C" and argument.dtype == wanted
    ):
        raise error(
            f"{made.__name__}: {name} must be a contiguous register tile of {operand.count} "
            f"{wanted}, got {argument}"
        )
    return argument


def _return_type(results: list[Any]) -> Any:
    if len(results) > 1:
        return types.BaseTuple.from_types(results)
    return results[0] if results else types.void


def _emit(
    context: Any,
    builder: Any,
    signature: Any,
    values: Any,
    operands: Any,
    text: str,
    memory: bool,
    volatile: bool,
) -> Any:
    """Write one inline-assembly call: its outputs first, its inputs, then what shares a register.

    LLVM numbers registers in that order, so an output's number is known before the inputs'.
    """
    if not text:
        return context.get_dummy_value()
    outputs: list[tuple[str, Any]] = []  # constraint letter, where to store it (None: return it)
    inputs: list[tuple[str, Any]] = []  # constraint letter, value
    shared: list[tuple[str, Any]] = []  # number of the output, value
    first_input = sum(operand.count or 1 for operand in operands if operand.access)
    names: list[str] = []  # of every operand, in the text
    arguments = iter(zip(values, signature.args, strict=True))

    def output(letter: str, pointer: Any) -> str:
        outputs.append((letter, pointer))
        return f"${len(outputs) - 1}"

    def given(letter: str, value: Any) -> str:
        inputs.append((letter, value))
        return f"${first_input + len(inputs) - 1}"

    for operand in operands:
        if operand.returned:
            names.append(output(operand.letter, None))
            continue
        value, kind = next(arguments)
        if operand.literal:
            names.append(str(kind.literal_value))
        elif operand.letter == "t":
            _take_by_value(builder)
            names.append(given("l", builder.ptrtoint(value, ir.IntType(64))))
        elif operand.count is None:
            names.append(given(operand.letter, value))
        else:
            data = context.make_array(kind)(context, builder, value=value).data
            registers = []
            for element in range(operand.count):
                pointer = builder.gep(data, [ir.Constant(ir.IntType(64), element)])
                if operand.access == "+":
                    shared.append((str(len(outputs)), builder.load(pointer)))
                if operand.access:
                    registers.append(output(operand.letter, pointer))
                else:
                    registers.append(given(operand.letter, builder.load(pointer)))
            names.append(f"{{{', '.join(registers)}}}")

    constraints = [f"={letter}" for letter, _ in outputs]
    constraints += [constraint for constraint, _ in inputs + shared]
    constraints += ["~{memory}"] if memory else []
    taken = [value for _, value in inputs + shared]
    kinds = [context.get_value_type(_scalar(letter)) for letter, _ in outputs]
    result = ir.VoidType()
    if kinds:
        result = kinds[0] if len(kinds) == 1 else ir.LiteralStructType(kinds)
    assembly = ir.InlineAsm(
        ir.FunctionType(result, [value.type for value in taken]),
        re.sub(r"\$(\d+)", lambda match: names[int(match[1])], text),
        ",".join(constraints),
        side_effect=volatile,
    )
    # convergent: no copy of a warp-wide instruction may move into a branch
    call = builder.call(assembly, taken, attrs=("convergent",))
    made = [call]
    if len(kinds) != 1:
        made = [builder.extract_value(call, i) for i in range(len(kinds))]
    returned = []
    for value, (_, pointer) in zip(made, outputs, strict=True):
        if pointer is None:
            returned.append(value)
        else:
            builder.store(value, pointer)
    if not returned:
        return context.get_dummy_value()
    if len(returned) == 1:
        return returned[0]
    return context.make_tuple(builder, signature.return_type, returned)


def _take_by_value(builder: Any) -> None:
    """Make the kernel take its tensor maps by value (``__grid_constant__``): TMA reads them there.

    The instruction is in the kernel itself, as fragments are inlined.
    """
    function, module = builder.function, builder.module
    found = [
        (number, argument)  # number 0 is Numba's status, which goes: the others count from 1
        for number, argument in enumerate(function.args)
        if argument.type == ir.PointerType(_TENSOR_MAP_BYTES)
    ]
    if isinstance(found[0][1].attributes, _ByValue):
        return
    for _, argument in found:
        argument.attributes = _ByValue()
        argument.attributes.named = (_architecture() or (9, 0)) >= (10, 0)
    places = module.add_metadata([ir.Constant(ir.IntType(32), number) for number, _ in found])
    entry = module.add_metadata((function, ir.MetaDataString(module, "grid_constant"), places))
    cgutils.get_or_insert_named_metadata(module, "nvvm.annotations").add(entry)
