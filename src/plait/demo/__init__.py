"""The demo: real tasks and a real pretrained model, both on disk after installation."""

from plait.demo.probe import floors_text
from plait.demo.run import copy_demo, demo_recipe, next_step, run_demo

__all__ = ["copy_demo", "demo_recipe", "floors_text", "next_step", "run_demo"]
