"""Hydra takes sweepers from here alone: `hydra/sweeper: study`, of experiment=study. Nothing heavy is imported before it sweeps."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class StudySweeper(Sweeper):
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from qfbench.commands.study import sweep

        compose = self.hydra_context.config_loader.load_sweep_config
        return sweep(self.config, arguments, lambda own: compose(self.config, list(own)), self.launcher.launch)


ConfigStore.instance().store(
    "study", {"_target_": f"{__name__}.StudySweeper"}, group="hydra/sweeper", provider="qfbench"
)
