"""The meter in other people's loops: transformers' Trainer, Lightning. For Accelerate: ``log=accelerator.log``."""

from __future__ import annotations

from typing import Any

from bursar.errors import MissingExtra
from bursar.meter.live import Meter


def trainer_callback(meter: Meter) -> Any:
    """A ``transformers.TrainerCallback``: ``Trainer(..., callbacks=[trainer_callback(meter)])``.

    The meter's last reading joins what the Trainer logs. Raises MissingExtra without transformers.
    """
    try:
        from transformers import TrainerCallback
    except ModuleNotFoundError as error:
        raise MissingExtra("hf", "this callback is for transformers' Trainer") from error

    class Callback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.step()

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with meter.paused():
                pass

        on_save = on_evaluate

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs is not None and meter.readings:
                logs.update(meter.readings[-1].numbers())

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.__exit__(None, None, None)

    return Callback()


def lightning_callback(meter: Meter) -> Any:
    """A Lightning ``Callback``; the Trainer's loggers get the readings too. Raises ModuleNotFoundError without it."""
    from lightning.pytorch import Callback as Base

    class Callback(Base):
        steps = readings = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            meter.__enter__()
            self.steps = trainer.global_step

        def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step == self.steps:
                return  # a micro-batch within a step
            self.steps = trainer.global_step
            meter.step()
            if len(meter.readings) != self.readings:
                self.readings = len(meter.readings)
                for logger in trainer.loggers:
                    logger.log_metrics(meter.readings[-1].numbers(), step=self.steps)

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            with meter.paused():
                pass

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            meter.__exit__(None, None, None)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            meter.__exit__(type(exception), exception, exception.__traceback__)

    return Callback()
