"""A Lightning callback that restructures the model for fitting and gives its own forward back afterwards.

Works with ``lightning`` and, where only that is installed, ``pytorch_lightning``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnrestructure.api import explain, restructure, unrestructure
from bnrestructure.core.errors import UsageError
from bnrestructure.plan.plan import Plan

if TYPE_CHECKING:
    Callback: Any = object
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback

__all__ = ["RestructureCallback"]


class RestructureCallback(Callback):
    """``Trainer(callbacks=[RestructureCallback()])``: fit runs restructured, everything else and everybody after it the plain model.

    Restructured are the LightningModule's networks: each attribute that is a module with batch norm layers inside (name those that call
    ``F.batch_norm`` in ``modules``). Where its own ``forward`` calls layers one by one, it is the LightningModule itself. Checkpoints are
    those of the plain model.

    backend, passes, strict    as :func:`bnrestructure.restructure` takes them
    modules                    names of the submodules to restructure, instead of all that have batch norms
    plans                      after setup: the :class:`bnrestructure.Plan` of each restructured module, by its name

    Raises UsageError, when fitting begins, for a name that the LightningModule has not.
    """

    def __init__(
        self,
        *,
        backend: str = "auto",
        passes: str | Sequence[str] | None = None,
        strict: bool = False,
        modules: Sequence[str] | None = None,
    ) -> None:
        self.options = {"backend": backend, "passes": passes}
        self.strict = strict
        self.modules = modules
        self.plans: dict[str, Plan] = {}
        self._restructured: list[nn.Module] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before the strategy wraps the model, so that DDP and FSDP see it restructured."""
        if stage != "fit":
            return
        for name, module in self._networks(pl_module):
            restructure(module, strict=self.strict, **self.options)  # type: ignore[arg-type]
            self._restructured.append(module)
            self.plans[name] = explain(module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """After fitting: the original forwards again."""
        self._undo()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Also where fitting ends early."""
        self._undo()

    def _undo(self) -> None:
        while self._restructured:
            unrestructure(self._restructured.pop())

    def _networks(self, pl_module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if self.modules is not None:
            for name in self.modules:
                try:
                    yield name, pl_module.get_submodule(name)
                except AttributeError as error:
                    raise UsageError(f"{type(pl_module).__name__} has no submodule {name!r} to restructure") from error
            return
        with_batch_norms = [
            (name, child) for name, child in pl_module.named_children()
            if not isinstance(child, _BatchNorm) and any(isinstance(m, _BatchNorm) for m in child.modules())
        ]  # fmt: skip
        yield from with_batch_norms or [(type(pl_module).__name__, pl_module)]
