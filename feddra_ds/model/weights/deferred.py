"""A model without its weights: what builds it is written down instead of computed, and each weight is made when asked for.

`defer(build)` runs `build` on torch's meta device and notes every operation on a weight: draws, fills, copies, tensors
read from safetensors files. `Weights.read(name)` then computes one weight from its own operations, so a model of any
size can be brought into an engine, or into files, one tensor at a time. The result has the bits of `build()` run
plainly, on every rank alike: draws are taken from torch's generator in the order in which they were asked for, and the
state of the generator before each of them is kept (5 KB), so that weights may be read in any order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from feddra_ds.model.weights.host_memory import returned_when_freed
from feddra_ds.model.weights.tape import CannotDefer, Node, Operation, Tape, Window

log = logging.getLogger("feddra_ds")
M = TypeVar("M", bound=nn.Module)
CPU, META = torch.device("cpu"), torch.device("meta")
_aten = torch.ops.aten
_OVERWRITING = {_aten.normal_, _aten.uniform_, _aten.zero_, _aten.fill_, _aten.copy_}
_NEEDS_VALUE = {_aten._local_scalar_dense, _aten.equal, _aten.is_nonzero}


class Recorder(TorchDispatchMode):
    """While it is active, tensors that would be made on the CPU are made on the meta device, and the tape says how."""

    def __init__(self) -> None:
        super().__init__()
        self.tape = Tape()
        self._nodes: dict[int, Node] = {}  # by storage
        self._alive: list[Any] = []  # storages and generators, lest another gets the same address

    def from_file(self, read: Callable[[], Tensor], shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """A tensor whose content `read()` gives, contiguous, in this shape and dtype."""
        with _disable_current_modes():
            tensor = torch.empty(tuple(shape), dtype=dtype, device=META)
        self._new_node(tensor, read)
        return tensor

    def window(self, tensor: Tensor) -> Window | None:
        """Where a tensor's content is on the tape; None where it is a plain tensor."""
        node = self._nodes.get(tensor.untyped_storage()._cdata)
        if node is None:
            return None
        return Window(node, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _new_node(self, tensor: Tensor, read: Callable[[], Tensor] | None = None) -> Node:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        node = self._nodes[storage._cdata] = Node(storage.nbytes(), read)
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        on_meta = device is not None and device.type == "meta"
        noted = [tensor for tensor in tensors if self.window(tensor) is not None]
        random = torch.Tag.nondeterministic_seeded in func.tags
        if func.overloadpacket in _NEEDS_VALUE and noted:
            return func(*tree_map_only(Tensor, self._known, args), **kwargs)
        makes = not tensors and any(a.name == "device" for a in func._schema.arguments) and not on_meta
        if (
            func is _aten.empty_like.default and not noted and device == CPU and args[0].is_meta
        ):  # leaving the meta device
            dtype = kwargs.get("dtype") or args[0].dtype
            return self._note(_aten.empty.memory_format, (list(args[0].shape),), {"dtype": dtype, "device": CPU}, False)
        if (not noted and not makes) or on_meta:
            if (
                random
                and not on_meta
                and kwargs.get("generator") is None
                and all(t.device.type == "cpu" for t in tensors)
            ):
                raise CannotDefer(f"{func} draws into a tensor that is there already")
            return func(*args, **kwargs)
        return self._note(func, args, kwargs, random)

    def _known(self, tensor: Tensor) -> Tensor:
        window = self.window(tensor)
        return tensor if window is None else self.tape.value(window)

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], random: bool) -> Any:
        generator = kwargs.get("generator") if random else None
        seeded = None
        if generator is not None:
            if any(generator is seen for seen in self._alive):
                raise CannotDefer("a generator of its own is drawn from twice")
            self._alive.append(generator)
            seeded = generator.get_state()
        kwargs = {key: value for key, value in kwargs.items() if key != "generator" or not random}
        written = self._written(func, args, kwargs)
        if func.overloadpacket in _OVERWRITING and _covers_its_storage(args[0]):
            written = [self._new_node(args[0])]
        known = {argument.name for argument in func._schema.arguments}
        made = not any(isinstance(leaf, Tensor) for leaf in tree_flatten((args, kwargs))[0])
        template_args, template_kwargs = tree_map_only(Tensor, self._template, (args, kwargs))
        out = func(*args, **kwargs | ({"device": META} if made or "device" in kwargs else {}))
        if made and "dtype" in known:  # else it would depend on the default at the time of reading
            template_kwargs["dtype"] = out.dtype
        outputs = []
        for position, leaf in enumerate(tree_flatten(out)[0]):
            if isinstance(leaf, Tensor) and self.window(leaf) is None:
                self._new_node(leaf)
                window = self.window(leaf)
                assert window is not None
                outputs.append((position, window))
        if outputs or written:  # else it is a view
            draws = random and generator is None
            self.tape.append(
                Operation(func, template_args, template_kwargs, tuple(outputs), tuple(written), draws, seeded)
            )
        return out

    def _written(self, func: Any, args: Any, kwargs: dict[str, Any]) -> list[Node]:
        nodes = []
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in tree_flatten(given)[0]:
                window = self.window(tensor)
                if window is None:
                    raise CannotDefer(f"{func} writes into a tensor that is there already")
                nodes.append(window.node)
        return nodes

    def _template(self, tensor: Tensor) -> Any:
        window = self.window(tensor)
        if window is not None:
            return window
        if tensor.device.type == "meta":
            raise CannotDefer("a tensor of the meta device has no content to go on with")
        return tensor.detach().clone()


def _covers_its_storage(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


class _AsOnCpu(TorchFunctionMode):
    """Shows the recorder's tensors as CPU tensors: initialisers do nothing to tensors of the meta device."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist and (window := self._recorder.window(args[0])) is not None:
            with _disable_current_modes():
                return self._recorder.tape.value(window).tolist()
        shown = _SHOWN.get(func)
        if shown is not None and self._recorder.window(args[0]) is not None:
            return shown(*args)
        return func(*args, **(kwargs or {}))


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.clone()
    return memo[id(tensor)]


_SHOWN: dict[Any, Callable[..., Any]] = {
    torch.Tensor.is_meta.__get__: lambda tensor: False,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda tensor: True,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__: lambda tensor: CPU,  # type: ignore[attr-defined]
    torch.Tensor.__deepcopy__: _deepcopy,  # of buffers; parameters clone themselves
}


class Weights:
    """The parameters and buffers of a model that `defer` built, by name."""

    def __init__(self, recorder: Recorder, model: nn.Module):
        self._tape = recorder.tape
        self._content: dict[str, Window | Tensor] = {}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            window = recorder.window(tensor)
            if window is None and tensor.device.type == "meta":
                raise CannotDefer(f"nothing says what {name} holds")
            self._content[name] = tensor.detach() if window is None else window

    def __contains__(self, name: str) -> bool:
        return name in self._content

    def read(self, name: str) -> Tensor:
        """One parameter or buffer on the CPU: the caller's own, contiguous, in the dtype that the model was built in."""
        content = self._content[name]
        if isinstance(content, Tensor):
            return content.clone()
        value = self._tape.value(content)
        whole = _covers_its_storage(value)
        return value if whole else value.clone(memory_format=torch.contiguous_format)

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """`read` of several, in the order that takes each draw once."""

        def draw(name: str) -> int:
            content = self._content[name]
            return -1 if isinstance(content, Tensor) else self._tape.last_draw(content.node)

        for name in sorted(names, key=draw):
            yield name, self.read(name)

    def leave_generator(self) -> None:
        """Put torch's CPU generator where building the model plainly would have left it."""
        torch.set_rng_state(self._tape.end_state())


_active: list[Recorder] = []


def recording() -> Recorder | None:
    """The recorder of the `defer` that is going on."""
    return _active[-1] if _active else None


@returned_when_freed()
def defer(build: Callable[[], M]) -> tuple[M, Weights | None]:
    """`build()` with all its parameters and buffers on the meta device, and what they hold.

    Where that cannot be done (weights in files other than safetensors, an encoder of an unknown type that is compared
    with its cut self) the model has its weights and None comes with it, after one warning.
    """
    state = torch.get_rng_state()
    recorder = Recorder()
    _active.append(recorder)
    try:
        with recorder, _AsOnCpu(recorder):
            model = build()
        if not torch.equal(torch.get_rng_state(), state):
            raise CannotDefer("it seeds torch's generator itself")
        return model, Weights(recorder, model)
    except Exception as error:  # a user's mistake is raised again by the plain build, as it would be without deferring
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        _active.pop()
        torch.set_rng_state(state)
    model = build()
    log.warning("the model is built whole on the host of every rank: %s", reason)
    return model, None


def lay_out(
    model: nn.Module, weights: Weights, make: Callable[[nn.Parameter], nn.Parameter], device: torch.device
) -> None:
    """Put make(parameter) in the place of each parameter, of tied ones the same, and read the buffers."""
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = make(parameter)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = weights.read(f"{path}.{name}" if path else name).to(device)


def make_room(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """`module` on a device in a dtype; what is on the meta device comes without content."""
    on_meta = any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    return module.to(dtype=dtype).to_empty(device=device) if on_meta else module.to(device=device, dtype=dtype)
