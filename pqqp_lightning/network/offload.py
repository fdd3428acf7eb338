"""Where a model's weights lie while their block is not at work: on the device, in host memory, or on disk.

On disk, every weight is mapped from a file: from the safetensors file that it was loaded from, or, once it has changed,
from an unnamed scratch file. So any code can read and write it at any time. What offloading adds is that pages leave
memory again, after each block's turn. On a GPU, a block's weights are copied there for the block's turn.

accelerate and transformers have hooks that bring weights to the device for a forward pass. They serve inference: what
a stage writes into a weight is lost when the hook drops it, and a weight on the meta device cannot be read between the
passes, as constraints, sizes and checkpoints need it. safetensors' lazy slices read from files only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from pqqp_lightning.network.blocks import Blocks, model_blocks
from pqqp_lightning.network.constraints import constrained_layers
from pqqp_lightning.network.free_memory import free_memory
from pqqp_lightning.network.mapped_tensors import as_bytes, mapped_files, place_of
from pqqp_lightning.network.weight_files import SMALLEST, WeightFiles, replace

Mode = Literal["none", "host", "disk"]
Choice = Literal["auto", "none", "host", "disk"]
OPTION = "offload"
"""The argument of a model that chooses. It does not change results, and so does not tell runs apart."""
ROOM = 1.6
"""What a run without training takes beside the data, in weights of the model; tests/test_memory.py holds it to that."""

Key = TypeVar("Key")


@dataclass
class _Turn:
    """An open turn of a module: how often it was entered, and the parameters that it brought, with their home."""

    depth: int = 0
    brought: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)


class Offload:
    """Keeps a model's weights away from the device, or out of memory, while their block is not at work.

    Args:
        model: the whole model; None for one that stays where it is.
        choice: "none", "host", "disk", or "auto" for the first of them that fits.

    Attributes:
        mode: what was chosen; "none" until the device is known.
    """

    def __init__(self, model: nn.Module | None = None, choice: Choice = "none") -> None:
        self.mode: Mode = "none"
        self._choice = choice
        self._model: Callable[[], nn.Module | None] = (lambda: None) if model is None else ref(model)
        self._device: torch.device | None = None
        self._turns: dict[nn.Module, _Turn] = {}
        self._passes: dict[nn.Module, ExitStack] = {}
        self._ahead: dict[nn.Module, list[tuple[nn.Parameter, int, Tensor]]] = {}
        self._stream: Any = None
        self._files = WeightFiles()

    def connect(self, device: torch.device, folder: Path | None = None) -> None:
        """Say which device the model runs on, and where scratch files may go: now the choice is made.

        Args:
            device: of the run.
            folder: of the run; it need not exist yet.
        """
        self._files.folder = folder or self._files.folder
        model = self._model()
        if model is None or device == self._device:
            return
        self._device = device
        if self.mode == "none":
            self.mode = self._chosen(model, device)
            if self.mode != "none":
                self._take_over(model)

    @property
    def folder(self) -> Path:
        """Where scratch files go."""
        return self._files.existing_folder()

    @contextmanager
    def turn(self, module: nn.Module, ahead: nn.Module | None = None, *, read_only: bool = False) -> Iterator[None]:
        """Inside, the weights in ``module`` are on the device and may be changed or replaced.

        Afterwards they lie where they belong: changed ones are written there, and their memory is free. Turns may be
        nested.

        Args:
            module: a block, or any other part of the model.
            ahead: the module whose turn is next; on a GPU its weights are copied meanwhile.
            read_only: nobody writes to the weights; on a GPU they are then not copied back.
        """
        if self.mode == "none":
            yield
            return
        if module not in self._turns:
            brought = self._bring(module)
            self._turns[module] = _Turn(brought=brought)
        turn = self._turns[module]
        turn.depth += 1
        if ahead is not None:
            self._fetch(ahead)
        try:
            yield
        finally:
            turn.depth -= 1
            if not turn.depth:
                del self._turns[module]
                self._send(module, turn.brought, read_only=read_only)
                self.settle(module)

    def settle(self, module: nn.Module) -> None:
        """Write what changed or is new in ``module`` to where it belongs, and let its pages leave memory."""
        if self.mode != "disk":
            return
        for tensor in _tensors(module):
            if self._is_home(tensor):
                self._files.settle(tensor)
        self._files.drop_originals()

    def visit(self, tensors: Iterable[tuple[Key, Tensor]]) -> Iterator[tuple[Key, Tensor]]:
        """The same named tensors, one by one; each settles when the next is asked for.

        Args:
            tensors: parameters, or views of whole parameters, which must not be written to.
        """
        for key, tensor in tensors:
            yield key, tensor
            if self.mode == "disk" and (isinstance(tensor, nn.Parameter) or not self._files.is_changed(tensor)):
                self._files.settle(tensor)

    def original(self, tensor: Tensor) -> Tensor | None:
        """What the weight ``tensor`` holds, mapped from the file of the model; None if it is not in that file."""
        return self._files.original(tensor)

    def staying(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``fn`` of ``nn.Module._apply``, which moves and converts tensors, without the moves of offloaded weights."""
        device = fn(torch.empty(0)).device
        if device.type != "cpu":
            self.connect(device)
        model = self._model()
        if self.mode == "none" or model is None:
            return fn
        held = {id(parameter) for block in self._units(model).values() for parameter in block.parameters()}

        def stay(tensor: Tensor) -> Tensor:
            if id(tensor) not in held or tensor.is_meta:
                return fn(tensor)
            dtype = fn(tensor.detach().new_empty(0)).dtype
            return tensor if dtype == tensor.dtype else self._at_home(tensor.detach().to(dtype))

        return stay

    def __deepcopy__(self, memo: dict[int, Any]) -> Offload:
        """Itself: blocks that a copy of the model's structure gives back have hooks that refer to it."""
        return self

    def __reduce__(self) -> tuple[type[Offload], tuple[()]]:
        """A model that is pickled is whole, wherever it is loaded."""
        return Offload, ()

    def _chosen(self, model: nn.Module, device: torch.device) -> Mode:
        """The mode for ``device``; says so where it is not the usual one."""
        if self._choice == "host" and device.type == "cpu":
            return "none"  # the weights are in host memory
        if self._choice != "auto":
            return self._choice
        regions = mapped_files()
        total = 0
        held = 0
        for parameter in model.parameters():
            total += parameter.nbytes
            held += 0 if place_of(parameter, regions) else parameter.nbytes
        needed, free = ROOM * total, free_memory()
        on_host = free is None or needed - held <= free
        mode: Mode = "none" if on_host else "disk"
        where = "memory"
        if device.type == "cuda":
            on_device, _ = torch.cuda.mem_get_info(device)
            where = f"memory of {device}"
            mode = "none" if needed <= on_device else "host" if on_host else "disk"
            free = on_device
        if mode != "none" and free is not None:
            text = f"{total / 1e9:.1f} GB of weights take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB"
            rank_zero_info(f"model.{OPTION}: {mode}, since {text} of {where} are free.")
        return mode

    def _take_over(self, model: nn.Module) -> None:
        """Move the weights of a loaded model to where they belong from now on."""
        if self.mode == "disk":
            self._files.adopt(_tensors(model))
            self.settle(model)
        elif self._is_elsewhere():
            for block in self._units(model).values():
                for parameter in block.parameters():
                    replace(parameter, self._at_home(parameter.detach()))
        for unit in self._units(model).values():
            unit.register_forward_pre_hook(self._enter)
            unit.register_forward_hook(self._leave, always_call=True)

    def _units(self, model: nn.Module) -> Blocks:
        """The modules that have turns of their own: the blocks, and on a CPU what has weights around them."""
        blocks = model_blocks(model)
        units = {} if "" in blocks else dict(blocks)
        if not self._is_elsewhere():
            inside = {part for block in units.values() for part in block.modules()}
            for name, module in model.named_modules():
                if module not in inside and any(True for _ in module.parameters(recurse=False)):
                    units[name] = module
        return units

    def _enter(self, module: nn.Module, args: Any) -> None:
        """Before a forward pass of a module outside of its turn, as in a pass of the whole model."""
        stack = self._passes.setdefault(module, ExitStack())
        stack.enter_context(self.turn(module, read_only=True))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        stack = self._passes.pop(module, None)
        if stack is not None:
            stack.close()

    def _is_elsewhere(self) -> bool:
        """Whether the device has a memory of its own."""
        return self._device is not None and self._device.type != "cpu"

    def _to_device(self, home: Tensor) -> Tensor:
        assert self._device is not None
        return home.to(self._device, non_blocking=True)

    def _is_cuda(self) -> bool:
        return self._device is not None and self._device.type == "cuda"

    def _is_home(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def _bring(self, module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Copy the weights in ``module`` to the device; returns those that were not there, with their home."""
        brought: list[tuple[nn.Parameter, Tensor]] = []
        if not self._is_elsewhere():
            return brought
        fetched: dict[int, tuple[int, Tensor]] = {}
        for parameter, version, copy in self._ahead.pop(module, ()):
            fetched[id(parameter)] = version, copy
        if not self._turns:
            self._ahead.clear()  # of a turn that did not come
        if fetched and self._is_cuda():
            torch.cuda.current_stream(self._device).wait_stream(self._side_stream())
        for parameter in module.parameters():
            if not self._is_home(parameter):
                continue
            home = parameter.data
            version, copy = fetched.get(id(parameter), (-1, home))
            if version != parameter._version:  # not fetched, or written to since
                copy = self._to_device(home)
            elif self._is_cuda():
                copy.record_stream(torch.cuda.current_stream(self._device))
            replace(parameter, copy)
            brought.append((parameter, home))
        return brought

    def _send(self, module: nn.Module, brought: list[tuple[nn.Parameter, Tensor]], *, read_only: bool) -> None:
        """Put the weights in ``module`` back where they were, with what they hold now, and new ones beside them."""
        if not self._is_elsewhere():
            return
        for parameter, home in brought:
            now = parameter.data
            if not read_only and (now.shape != home.shape or now.dtype != home.dtype or not now.is_contiguous()):
                home = self._at_home(now)
            elif not read_only:
                on_host = now.cpu()
                if not torch.equal(as_bytes(on_host), as_bytes(home)):  # else a mapped file would be written anew
                    home.copy_(on_host)
            replace(parameter, home)
        if any(module is part for outer in self._turns for part in outer.modules()):
            return  # the outer turn brought the others, and still needs the new ones
        for parameter in module.parameters():
            if not self._is_home(parameter):
                replace(parameter, self._at_home(parameter.detach()))

    def _fetch(self, module: nn.Module) -> None:
        """Start to copy the weights in ``module`` to the device, beside the work of the current turn."""
        if not self._is_elsewhere() or module in self._turns or module in self._ahead:
            return
        with torch.cuda.stream(self._side_stream()) if self._is_cuda() else nullcontext():
            copies = []
            for parameter in module.parameters():
                if self._is_home(parameter):
                    copies.append((parameter, parameter._version, self._to_device(parameter.data)))
            self._ahead[module] = copies

    def _side_stream(self) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream

    def _at_home(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` where weights lie outside of their turns."""
        if self.mode == "disk" and tensor.nbytes >= SMALLEST:
            return self._files.stored(tensor)
        return tensor.cpu().pin_memory() if self.mode == "host" and self._is_cuda() else tensor.cpu()


def offload_of(module: nn.Module) -> Offload:
    """Return how ``module``, a whole model, is offloaded: mode "none" unless :func:`offload_model` was called."""
    return _OFFLOADS.get(module, _NOWHERE)


def offload_model(module: nn.Module, choice: Choice) -> Offload:
    """Offload ``module``, a whole model with its weights, as ``choice`` says; see :class:`Offload`.

    It begins when the device is known: :meth:`Offload.connect`.
    """
    if choice == "none":
        return _NOWHERE
    return _OFFLOADS.setdefault(module, Offload(module, choice))


_OFFLOADS: WeakKeyDictionary[nn.Module, Offload] = WeakKeyDictionary()
"""Beside the models, not in them: copies of a model, its fingerprint and its pickle have nothing to do with it."""
_NOWHERE = Offload()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """The weights in ``module``, and the masks and scales of its layers."""
    yield from module.parameters()
    for _, _, constraints in constrained_layers(module):
        grid = constraints.grid
        parts = [constraints.mask_bits] + ([] if grid is None else [grid.scale, grid.zero])
        yield from [part for part in parts if part is not None]
