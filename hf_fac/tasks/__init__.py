"""What is a sample of this task, how is it asked for and read?"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "task": ["BUILTIN_TASKS", "Task", "get_task"],
    },
)
