"""The demo: real tasks and a real pretrained model, both on disk after installation."""

from plait.demo.run import demo_recipe, next_step, run_demo

__all__ = ["demo_recipe", "next_step", "run_demo"]
