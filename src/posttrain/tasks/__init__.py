"""Tasks: prompts with rewards that verify the answers, in disjoint splits."""

from posttrain.tasks.task import TASKS, Task, task

__all__ = ["TASKS", "Task", "task"]
